"""SL-CBM (AAAI 2026): concept scores for every cell of the image, and a label that rests on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, normalize

from cbm_lightning.bottlenecks.linear import LinearBottleneck
from cbm_lightning.bottlenecks.scalar import Link, ScalarBottleneck
from cbm_lightning.bottlenecks.similarity import SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead, NormalizedHead
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, LossContext, masked_mean

Pool = Literal["attention", "max", "mean"]
Extra = Literal["entropy", "contrastive", "mask"]


class ConceptAttention(nn.Module):
    """Cross-attention of image-wide concept scores over the cells' (SimPool, Psomas et al. 2023, without its power).

    ``a = softmax(W_q q . (W_k LN(S))^T / sqrt(K))`` over the real cells and ``z = a . LN(S)``, where the LayerNorm runs
    over the concepts of a cell. Nothing is projected between ``LN(S)`` and ``z``, so each concept keeps its own map.

    Args:
        concepts: ``K``.
    """

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(concepts, eps=1e-6)
        self.query = nn.Linear(concepts, concepts, bias=False)
        self.key = nn.Linear(concepts, concepts, bias=False)

    def forward(self, query: Tensor, scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool the scores of the cells.

        Args:
            query: ``[B, K]`` scores of the whole image.
            scores: ``[B, N, K]`` scores of the cells, in single precision.
            real: ``[B, N]`` bool, False for padding.

        Returns:
            ``[B, N, K]`` what the cells add to each pooled score; the rest of it, ``[K]``, which has no place; and the
            attention ``[B, N]``, which sums to one, or to zero where all is padding.
        """
        normalized, shift = self.normalize(scores), self.norm.bias.float()
        # the key weighs the query instead of every cell: K^2 products an image, not an image and cell
        asked = query.float() @ self.query.weight.float().T @ self.key.weight.float()
        match = (normalized @ asked.unsqueeze(-1)).squeeze(-1) * scores.shape[-1] ** -0.5
        attention = match.masked_fill(~real, torch.finfo(match.dtype).min).softmax(1) * real
        # the shift is the same in every cell, so it belongs to no place
        return (normalized - shift) * attention.unsqueeze(-1), shift, attention

    def normalize(self, scores: Tensor) -> Tensor:
        """``LN(S)``: ``[B, N, K]`` scores, in single precision, normalised over the concepts of each cell."""
        return layer_norm(
            scores, self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps
        )


class SpatialBottleneck(ScalarBottleneck):
    """Concept maps that are the computation (SL-CBM, "Semantic Locality", arXiv 2601.12804).

    A 1x1 convolution of the patch tokens gives each cell a score a concept, ``S = W tokens``; the score of the image is
    pooled from nothing else. With attention, ``z = sum_n a_n LN(S)_n``, and the map ``N a_n (LN(S)_n - b)`` is exactly
    what each cell adds: its mean and ``b``, the shift of the LayerNorm, are ``z``. Without attention the map is ``S``
    less its bias, and its mean, or largest cell, and the bias are the score. (The official code shows ``S`` whatever it
    pools.) ``S`` itself is kept in ``extras["scores"] [B, N, K]``, ``a`` in ``extras["attention"] [B, N]``.

    Losses beside ``concept``, each computed only where it is listed in ``losses``:

    - ``entropy``, in ``[0, log K]``: of the softmax over the concepts of a cell, averaged over the real cells of the
      batch, so that it does not grow with the grid. The official code sums it over 196 cells and multiplies by 5,
      beside ``1e4`` times the L1 concept loss: weights in that proportion are 1 and 10 here.
    - ``contrastive``, at least 0: samples of one class should have pooled scores in one direction. Cross-entropy, at
      temperature 1, of cosine similarities within the batch, every other sample of the same class being right (the
      official code draws pairs and calls other samples of the class wrong). Zero in a batch without two of a class.
    - ``mask``, in [0, 1]: mean squared error of the sigmoid of what is pooled (``LN(S)``, or ``S`` without attention)
      and the share of each cell that ``concept_masks`` cover. It counts where a mask shows something or the concept is
      annotated as absent, so images without masks do no harm. (The official code takes ``S`` as it is, which leaves the
      maps free to lie elsewhere, for the LayerNorm undoes the scale of each cell.)

    Args:
        link: What the head reads; the scores in the paper. See `ScalarBottleneck`.
        pool: ``"attention"`` (the paper), ``"max"`` or ``"mean"`` over the real cells.
        query: Scores of the pooled features that ask the cells, for ``pool="attention"``: a `SimilarityBottleneck`
            takes concept vectors, from texts or as ``embeddings`` of the concept set (the paper), a `LinearBottleneck`,
            the default, learns them from the losses above. Only the scores are read.
        concept_loss: ``"module"`` takes the configured loss of the module, ``"l1"`` the mean absolute error of
            probabilities (the paper).
        losses: Which of the losses above to add.
        randint: See `Bottleneck`.
        randint_scope: See `Bottleneck`.

    Raises:
        ValueError: An option is unknown, or ``query`` has no use. From `build`: the backbone has no patch tokens, or
            attention has a single concept, which normalises to zero. From `losses`: a training batch has no masks.

    Example:
        >>> bottleneck = SpatialBottleneck(losses=["entropy"])
        >>> bottleneck.build(FeatureDims(8, 6, (4, 4)), ConceptSet(["red", "round"]), num_classes=3)
        >>> output = bottleneck(Features(torch.randn(5, 8), torch.randn(5, 16, 6), grid=(4, 4)))
        >>> output.logits.shape, output.maps.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 4, 4]))
    """

    def __init__(
        self,
        link: Link = "logits",
        pool: Pool = "attention",
        query: LinearBottleneck | SimilarityBottleneck | None = None,
        concept_loss: Literal["module", "l1"] = "module",
        losses: Sequence[Extra] = (),
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(link, randint=randint, randint_scope=randint_scope)
        if pool not in get_args(Pool):
            raise ValueError(f"pool: expected one of {get_args(Pool)}, got {pool!r}")
        if query is not None and pool != "attention":
            raise ValueError(f"query: only pool='attention' asks, got pool={pool!r}; leave the query out")
        if query is not None and query.randint:
            raise ValueError("query: only its scores are read; give randint to the SpatialBottleneck itself")
        if concept_loss not in ("module", "l1"):
            raise ValueError(f"concept_loss: expected 'module' or 'l1', got {concept_loss!r}")
        if isinstance(losses, str) or set(losses) - set(get_args(Extra)):
            raise ValueError(f"losses: expected a list of {get_args(Extra)}, got {losses!r}")
        self.pool = pool
        self.concept_loss = concept_loss
        self.extra_losses = tuple(losses)
        self.query = (query or LinearBottleneck("logits")) if pool == "attention" else None

    def default_head(self) -> LabelHead:
        """A linear head on normalised scores, as in the paper."""
        return NormalizedHead()

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the convolution and the attention."""
        if dims.tokens is None:
            raise ValueError(
                "SpatialBottleneck: expected a backbone with patch tokens, which concept maps are made of, and this "
                "one returns none; choose another backbone or stage"
            )
        if self.query is not None and len(concepts) < 2:
            raise ValueError(
                "pool: 'attention' normalises over the concepts of a cell, which needs two or more, got 1; use 'max' "
                "or 'mean'"
            )
        if "mask" in self.extra_losses and concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"losses: 'mask' compares scores with the share of a cell that shows a concept, but {real} are "
                "real-valued; leave 'mask' out, or these concepts"
            )
        self.build_values(concepts)
        self.scores = nn.Linear(dims.tokens, len(concepts))
        self.attention = None if self.query is None else ConceptAttention(len(concepts))
        if self.query is not None:
            self.query.build(dims, concepts, num_classes)

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Score the concepts of each cell, and pool."""
        scores: Tensor = self.scores(_tokens(features))
        real = features.mask
        if real is None:
            real = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        cells, pooled, attention = self._pooled(features, scores, real)
        output = self.make_output(features, pooled.to(scores.dtype))
        extras = {"scores": scores} if attention is None else {"scores": scores, "attention": attention}
        flat = features.grid is None or len(features.grid) != 2
        return output.replace(maps=None if flat else features.as_map(cells), extras=extras)

    def _pooled(self, features: Features, scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maps ``[B, N, K]``, the scores of the image ``[B, K]``, and the attention ``[B, N]`` if there is any."""
        query = None if self.query is None else self.query(features).logits
        # half precision would break the sums that make maps exact
        with torch.autocast(scores.device.type, enabled=False):
            scores = scores.float()
            if query is not None and self.attention is not None:
                cells, shift, attention = self.attention(query, scores, real)
                return cells * cells.shape[1], cells.sum(1) + shift, attention
            shift = self.scores.bias.float()
            cells = (scores - shift) * real.unsqueeze(-1)
            if self.pool == "mean":
                pooled = masked_mean(cells, real)
                return cells * (real.shape[1] / real.sum(1).clamp(min=1))[:, None, None], pooled + shift, None
            pooled = cells.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(1)
            # an image that is padding all over shows nothing
            return cells, torch.where(real.any(1, keepdim=True), pooled, 0.0) + shift, None

    def concept_maps(self, output: ConceptOutput) -> Tensor:
        """What the cells add to each score; of ``"max"``, the score of each cell less the bias.

        Raises:
            ValueError: The tokens lie on no grid of two dimensions.
        """
        return output.features.as_map(output.extras["scores"]) if output.maps is None else output.maps

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss, and those of the regularisers that are asked for."""
        found: dict[str, Tensor] = {}
        if self.concept_loss == "l1":
            found["concept"] = annotated_l1(output.probs.float(), batch["concepts"])
        else:
            found |= super().losses(output, batch, context)
        with torch.autocast(output.logits.device.type, enabled=False):
            for name in self.extra_losses:
                if name == "entropy":
                    found[name] = cell_entropy(output.extras["scores"].float(), output.features.mask)
                elif name == "contrastive":
                    found[name] = same_class_contrast(output.logits.float(), batch["label"])
                elif "concept_masks" in batch:
                    scores = output.extras["scores"].float()
                    pooled = scores if self.attention is None else self.attention.normalize(scores)
                    maps = output.features.as_map(pooled.sigmoid())
                    found[name] = mask_error(maps, batch["concept_masks"], batch["concepts"])
                elif self.generator is not None:
                    raise ValueError(
                        "losses: 'mask' needs concept_masks in the training batches, and there are none; let the "
                        "datamodule bring them (masks: true), or leave 'mask' out"
                    )
        return found


def annotated_l1(probs: Tensor, concepts: Tensor) -> Tensor:
    """Mean absolute error of ``[B, K]`` probabilities, where annotated."""
    known = ~concepts.isnan()
    return (probs - concepts.nan_to_num()).abs().mul(known).sum() / known.sum().clamp(min=1)


def cell_entropy(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real cells of a batch ``[B, N, K]`` of the entropy of the softmax over concepts, in nats."""
    logs = scores.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return entropy.mean() if mask is None else (entropy * mask).sum() / mask.sum().clamp(min=1)


def same_class_contrast(scores: Tensor, label: Tensor) -> Tensor:
    """Mean over samples with company of the cross-entropy of finding it among the others of the batch.

    Args:
        scores: ``[B, K]``, compared by their cosine.
        label: ``[B]``, or ``[B, L]`` where a sample has several labels, all of which must agree.
    """
    directions = normalize(scores, dim=-1)
    others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    rows = label.reshape(len(label), -1)
    company = (rows[:, None] == rows[None]).all(-1) & others
    # a batch of one has no others, whose softmax would be NaN
    logs = (directions @ directions.T).masked_fill(~others, torch.finfo(scores.dtype).min).log_softmax(-1)
    counts = company.sum(1)
    each = -torch.where(company, logs, 0.0).sum(1) / counts.clamp(min=1)
    return each.sum() / (counts > 0).sum().clamp(min=1)


def mask_error(maps: Tensor, masks: Tensor, concepts: Tensor) -> Tensor:
    """Mean squared error of maps ``[B, K, h, w]`` and the share of each cell that masks ``[B, K, H, W]`` cover.

    It counts where the mask has a pixel (NaN is none) or ``concepts [B, K]`` deny the concept; zero without any.
    """
    shown = masks.to(maps.dtype).nan_to_num()
    counted = shown.flatten(2).any(2) | (concepts == 0)
    shares = adaptive_avg_pool2d(shown, (maps.shape[-2], maps.shape[-1]))
    errors = (maps - shares).square().mean((2, 3))
    return torch.where(counted, errors, 0.0).sum() / counted.sum().clamp(min=1)


def _tokens(features: Features) -> Tensor:
    """``[B, N, D]``.

    Raises:
        ValueError: There are none.
    """
    if features.tokens is None:
        raise ValueError(
            "SpatialBottleneck: expected tokens [B, N, D], got pooled features alone; let batches bring 'tokens', or "
            "images for a backbone that has them"
        )
    return features.tokens
