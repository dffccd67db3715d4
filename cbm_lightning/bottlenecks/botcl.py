"""BotCL (Wang et al., CVPR 2023): concepts that nobody annotated, each with a map of where it was found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from cbm_lightning.bottlenecks.botcl_losses import (
    active,
    consistency_loss,
    distinctiveness_loss,
    quantization_loss,
    retrieval_loss,
)
from cbm_lightning.bottlenecks.scalar import ScalarBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, LossContext

# in the competition no concept is amplified more than its share of the dots and this floor, relative to the mean, allow
FLOOR = 0.01
# below it the logit of tanh(x) is cut off
SMALLEST = 1e-6


class SlotBottleneck(ScalarBottleneck):
    """Discovers concepts from the label alone, by attention of one learned query each over the cells of an image.

    BotCL (Learning Bottleneck Concepts in Image Classification, Wang et al. 2023). Cells ``F`` are a projection of the
    tokens, keys an MLP of ``F`` plus a sine encoding of their places. The attention of concept ``k`` is the sigmoid
    of scaled dot products ``q_k . K(F) / sqrt(d)``, which are first rescaled by `compete`; its presence is ``t_k =
    tanh(sum of its attention)`` in [0, 1], which the head reads, and its map the attention. ``logits`` are those whose
    sigmoid is ``t``, exact also where ``t`` rounds to one. A correction sets ``t_k``; NaN takes the concept out.

    The model is told how many concepts to find (``concepts: 20``); annotations in batches are of other concepts and
    are left out. The losses, with the weights of the official recipe for CUB, whose backbone was pretrained with a
    linear layer on the same labels:

    - ``retrieval`` (0.1): codes ``2 t - 1`` of a class are alike, those of two classes differ.
    - ``area`` (0.1): the mean attention, so that a concept is found in few places.
    - ``quantization`` (0.1): codes are near -1 or 1.
    - ``distinctiveness`` (0.05): the mean features of two concepts differ.
    - ``consistency`` (0.01): the features of a concept are alike in the images that activate it.
    - ``reconstruction``: only with that option; the squared error of images decoded from ``t``.

    Weights are 1 where ``loss_weights`` of the module gives none. Losses over pairs see the batch of one process.
    The official slots loop three times over an update that changes nothing; here one pass gives the same.

    Args:
        width: ``d``, width of cells, keys and queries; a multiple of 4.
        competition: Rescale the dot products of each concept so that all have one sum over the cells (the paper).
        initial_sum: Add a learned threshold a concept to the dot products, from which the attention sums to about this
            at first. Without it (the paper) attention starts near one half everywhere, so that ``t`` is one and passes
            no gradient on until the area loss has pulled it down.
        reconstruction: Decode images of these channels, height and width from ``t``, to which the images of the batch
            are scaled by averages (the paper's variant for MNIST; here without a squashing output, so that normalised
            images can be reached).
        hidden: Width of the decoder's hidden layer.

    Attributes:
        decoder: From ``[B, K]`` to pixels, or None.

    Raises:
        ValueError: An option is out of range; from `build`, the backbone has no tokens on a grid, or concepts are not
            binary; from `losses`, the batch has no images to reconstruct, or others than expected.

    Example:
        >>> bottleneck = SlotBottleneck(width=16)
        >>> bottleneck.build(FeatureDims(8, tokens=8, grid=(4, 4)), ConceptSet.make(5), num_classes=3)
        >>> output = bottleneck(Features(torch.randn(2, 8), torch.randn(2, 16, 8), grid=(4, 4)))
        >>> output.values.shape, output.maps.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 4, 4]))
    """

    discovers = True
    needs_concepts = False
    needs_label = True

    def __init__(
        self,
        width: int = 128,
        competition: bool = True,
        initial_sum: float | None = None,
        reconstruction: Sequence[int] | None = None,
        hidden: int = 400,
    ) -> None:
        super().__init__("sigmoid")
        if width < 4 or width % 4:
            raise ValueError(f"width: expected a positive multiple of 4 for the encoding of places, got {width}")
        if initial_sum is not None and initial_sum <= 0:
            raise ValueError(f"initial_sum: expected a positive number or None, got {initial_sum}")
        if reconstruction is not None and (len(reconstruction) != 3 or min(reconstruction) < 1):
            raise ValueError(f"reconstruction: expected [channels, height, width], got {list(reconstruction)}")
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        self.width = width
        self.competition = competition
        self.initial_sum = initial_sum
        self.reconstruction = None if reconstruction is None else list(reconstruction)
        self.hidden = hidden

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make projection, keys, queries and decoder."""
        if dims.tokens is None or dims.grid is None or len(dims.grid) != 2:
            raise ValueError(
                f"{type(self).__name__} needs patch tokens on a grid (h, w), the backbone promises tokens of width "
                f"{dims.tokens} on {dims.grid}; choose another backbone, or a stage of it"
            )
        if set(concepts.kinds) != {"binary"}:
            raise ValueError(
                f"{type(self).__name__} finds concepts that are present or absent, got the kinds "
                f"{sorted(set(concepts.kinds))}; give the module their number, such as concepts=20"
            )
        self.build_values(concepts)
        number = len(concepts)
        self.project = nn.Linear(dims.tokens, self.width)
        self.norm = nn.BatchNorm1d(self.width)
        first, second, third = (nn.Linear(self.width, self.width) for _ in range(3))
        self.keys = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.queries = nn.Parameter(torch.randn(number, self.width))
        self.threshold = None
        if self.initial_sum is not None:
            share = min(self.initial_sum / math.prod(dims.grid), 0.5)
            self.threshold = nn.Parameter(torch.full((number, 1), math.log(share / (1.0 - share))))
        self.decoder = None
        if self.reconstruction is not None:
            pixels = math.prod(self.reconstruction)
            self.decoder = nn.Sequential(nn.Linear(number, self.hidden), nn.ReLU(), nn.Linear(self.hidden, pixels))

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Look for each concept in every cell.

        Raises:
            ValueError: The features have no tokens on a grid.
        """
        tokens, grid = features.tokens, features.grid
        if tokens is None or grid is None or len(grid) != 2:
            raise ValueError(f"{type(self).__name__} needs tokens on a grid (h, w), got features on {grid}")
        cells: Tensor = self.norm(self.project(tokens).transpose(1, 2)).transpose(1, 2).relu()
        keys = self.keys(cells + encode_places(grid[0], grid[1], self.width, cells))
        # sums over cells, exponentials of them and differences near one: half precision would round them away
        with torch.autocast(cells.device.type, enabled=False):
            dots = self.queries.float() @ keys.float().transpose(1, 2) / math.sqrt(self.width)  # [B, K, N]
            real = None if features.mask is None else features.mask[:, None].to(dots)
            if self.competition:
                dots = compete(dots if real is None else dots * real)
            attention = (dots if self.threshold is None else dots + self.threshold.float()).sigmoid()
            if real is not None:
                attention = attention * real
            total = attention.sum(-1)
            found = attention @ cells.float() / total.clamp(min=SMALLEST).unsqueeze(-1)
            logits = tanh_logits(total)
        own = self.queries.dtype
        output = self.make_output(features, logits.to(own))
        return output.replace(maps=features.as_map(attention.transpose(1, 2)), extras={"concept_features": found})

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The losses of the class docstring; those over pairs see the batch of one process."""
        maps, features = output.maps, output.extras["concept_features"]
        assert maps is not None
        with torch.autocast(features.device.type, enabled=False):
            codes = 2.0 * output.probs.float() - 1.0
            chosen = active(maps.mean((2, 3)))
            parts = {
                "retrieval": retrieval_loss(codes, batch["label"]),
                "area": maps.mean(),
                "quantization": quantization_loss(codes),
                "distinctiveness": distinctiveness_loss(features, chosen),
                "consistency": consistency_loss(features, chosen),
            }
        if self.reconstruction is not None:
            image = self._target(batch)
            parts["reconstruction"] = mse_loss(self.decode(output.values).float(), image)
        return parts

    def decode(self, values: Tensor) -> Tensor:
        """``[B, C, H, W]`` images of ``values [B, K]``, which a person may have corrected.

        Raises:
            ValueError: There is no decoder.
        """
        if self.decoder is None or self.reconstruction is None:
            raise ValueError("there is no decoder; give reconstruction=[channels, height, width] and train it")
        image: Tensor = self.decoder(values).unflatten(1, self.reconstruction)
        return image

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """``varying_concepts``, how many concepts are present in some images of the batch and absent in others."""
        present = output.probs >= 0.5
        return {"varying_concepts": (present.any(0) & ~present.all(0)).sum().float()}

    def _target(self, batch: Batch) -> Tensor:
        image, expected = batch.get("image"), self.reconstruction
        assert expected is not None
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != expected[0]:
            found = sorted(batch) if not isinstance(image, Tensor) else list(image.shape)
            raise ValueError(
                f"reconstruction: expected images [B, {expected[0]}, H, W] in the batch, got {found}; train on images, "
                "or set the channels to theirs"
            )
        return adaptive_avg_pool2d(image.float(), (expected[1], expected[2]))


def compete(dots: Tensor) -> Tensor:
    """Rescale the dot products of each concept so that their sums over the cells have one absolute value.

    ``dots_kj * sum_k |s_k| / |s_k|`` with ``s_k = sum_j dots_kj``. Where all sums have one sign this is the paper's
    ``dots_kj * (sum_k s_k) / s_k``; elsewhere that form turns signs around, and it is infinite where a sum is zero.
    Here signs stay, and sums below a hundredth of their mean count as that much.

    Args:
        dots: ``[B, K, N]``.

    Example:
        >>> compete(torch.tensor([[[1.0, 3.0], [-2.0, 1.0]]]))
        tensor([[[  1.2500,   3.7500],
                 [-10.0000,   5.0000]]])
    """
    sums = dots.sum(-1, keepdim=True).abs()
    smallest = (FLOOR * sums.mean(1, keepdim=True)).clamp(min=torch.finfo(dots.dtype).tiny)
    return dots * (sums.sum(1, keepdim=True) / torch.maximum(sums, smallest))


def tanh_logits(x: Tensor) -> Tensor:
    """The logits whose sigmoid is ``tanh(x)``, for ``x`` above zero; exact where ``tanh(x)`` rounds to one.

    Example:
        >>> x = torch.tensor([0.1, 2.0, 50.0])
        >>> tanh_logits(x).sigmoid(), tanh_logits(x)[2]
        (tensor([0.0997, 0.9640, 1.0000]), tensor(99.3069))
    """
    x = x.clamp(min=SMALLEST)
    return 2.0 * x + torch.log(-torch.expm1(-2.0 * x)) - math.log(2.0)


def encode_places(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """``[height * width, channels]`` sines and cosines of where a cell lies, half of them for its row.

    Places are shares of the whole, so that a grid of another size encodes the same places alike.

    Args:
        height: Of the grid.
        width: Of the grid.
        channels: A multiple of 4.
        like: A tensor of the wanted device and type.

    Example:
        >>> encode_places(2, 3, 8, torch.zeros(())).shape
        torch.Size([6, 8])
    """
    steps = torch.arange(channels // 4, device=like.device, dtype=torch.float32)
    frequencies = 2.0 * math.pi * 10000.0 ** (-4.0 * steps / channels)

    def encode(number: int) -> Tensor:
        place = (torch.arange(number, device=like.device, dtype=torch.float32) + 0.5) / number
        angles = place[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    rows, columns = encode(height)[:, None].expand(-1, width, -1), encode(width).expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1).to(like)
