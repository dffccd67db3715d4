"""Exact maps: where the score is a mean over places, the places are the explanation."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.subject import Subject


class ExactMaps(SaliencyMethod):
    """What each cell adds to the concept score, read off the model (class activation maps, Zhou et al. 2016).

    For a bottleneck that is linear in the mean of the tokens, and for one that computes with maps of its own. It costs
    next to nothing beside the forward pass, and no gradient: use it first. The mean of a map plus what has no place (a
    bias) is the score.
    """

    name = "exact"

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The bottleneck's own maps.

        Raises:
            NoExactMaps: It has none, or the pooled vector is not the mean of the tokens.
        """
        with torch.no_grad():
            return subject.exact_maps(subject.output(subject.features(image)))[rows, concepts]
