"""Grad-CAM for all concepts at once."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.saliency.last_map import find_map, graph_from
from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.subject import Subject

# their channel weights are in memory together
_CONCEPTS_AT_ONCE = 64


class GradCAM(SaliencyMethod):
    """The last feature map, its channels weighted by the mean slope of the concept score (Selvaraju et al. 2017).

    The backbone runs once for all concepts; only what follows the map is differentiated, once a concept. The map is
    found by running the backbone (`last_map.find_map`): the one before pooling in a convolutional network, the normed
    tokens before the last attention in a transformer with a class token, which is left out.

    Args:
        relu: Clip negative saliency, as the paper does; kept by default, because the metrics clip themselves.
        layer: Name of a module in the backbone whose output to use, for once that one wants to name a layer.
    """

    name = "grad_cam"

    def __init__(self, relu: bool = False, layer: str | None = None) -> None:
        self.relu = relu
        self.layer = layer

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps in the resolution of the feature map.

        Raises:
            ValueError: The backbone has no feature map.
        """
        place = find_map(subject, image[:1], self.layer)
        with graph_from(place) as found:
            features = subject.features(image)
            if not found:
                raise RuntimeError("grad_cam: the backbone ran another way than before, and never reached its last map")
            with torch.enable_grad():
                logits = subject.output(features).logits
        cells = place.cells(found[0].detach()).transpose(1, 2)  # [B, D, N]
        wanted, position = concepts.unique(return_inverse=True)
        every = []
        for some in wanted.split(_CONCEPTS_AT_ONCE):
            channels = [
                place.cells(torch.autograd.grad(logits[:, k].sum(), found[0], retain_graph=True)[0]).mean(1)
                for k in some.tolist()
            ]
            every.append(torch.stack(channels, 1) @ cells)
        maps: Tensor = torch.cat(every, 1)[rows, position].unflatten(1, place.grid)
        return maps.relu() if self.relu else maps
