"""Energy-based concept bottleneck models (Xu et al., ICLR 2024): one energy over input, concepts and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.bottlenecks.ecbm_conditionals import (
    Candidates,
    concepts_given_label,
    concepts_given_label_and_concept,
)
from cbm_lightning.bottlenecks.ecbm_inference import EnergyTerms, Held, JointTerms, Point, descend, mixture
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead, PassThroughHead
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext, ValueLayout

# the paper sets the two logits of a corrected concept to -5 and 5; this is their difference
CERTAIN = 10.0
# the same within a categorical group, where it competes with logits of any size
DECIDED = 1e4


class EnergyBottleneck(Bottleneck):
    """Concepts and label as the point of lowest energy (ECBM, arXiv 2401.14142).

    With ``u_y`` an embedding of class ``y`` and ``v_k^0``, ``v_k^1`` embeddings of the absence and the presence of
    concept ``k``, ``^`` a vector of length 1::

        E_xy(x, y)   = w1  . relu(z  + z  * ^u_y),    z  = dropout(Linear(x))
        E_xc(x, c_k) = w_k . relu(z' + z' * ^v_k^c),  z' = dropout(Linear'(x))
        E_cy(c, y)   = w2  . relu(h  + h  * ^u_y),    h  = Linear''(concatenated v_k^c)

    The losses are softmax cross-entropies over alternatives: ``label`` (``E_xy`` over classes), ``concept`` (``E_xc``
    over absent and present), and two of ``E_cy``, which the paper normalises over classes and all concept vectors at
    once: ``coherence`` over the classes, with annotated concepts of which some are flipped in some samples, and
    ``association`` over each concept in turn, given the others and the label (pseudo-likelihood, Besag 1975, where the
    paper samples negatives). The released code has no term over concepts; without one nothing says which concepts go
    together, and descending on ``E_cy`` moves them anywhere. The paper weighs label, concepts and ``E_cy`` by 3, 1 and
    1 and sums over concepts: ``loss_weights: {label: 3}``, ``ConceptLoss(reduction="sum")``.

    Training predicts each energy's own minimum (``logits = E_xc(absent) - E_xc(present)``, ``label_logits = -E_xy``).
    Evaluation starts there and descends on the weighted sum of all three by soft mixtures of the embeddings
    (``steps`` of Adam, each sample on its own, the best point kept). The class logits are then the negative energies
    of the classes, with the concepts that were found, as a weighted mean of ``E_xy`` and ``E_cy``; the paper reads the
    class off the mixture, of which this is the exact minimum over single classes.

    A corrected concept is held where the person puts it while the others and the label descend again: with other
    weights, so that ``E_cy`` moves concepts that go with the corrected ones. A concept that is taken out (NaN) leaves
    all energies. ``E_cy`` mixes softly as well: a threshold would pass nothing on to other concepts.

    Args:
        embedding_size: Length ``H`` of the embeddings and hidden vectors.
        dropout: On ``z`` and ``z'``.
        flip_samples: Share of the samples of a training step in which concepts are flipped for ``coherence``.
        flip_concepts: Share of the concepts flipped, the same in all of these samples.
        associate: Train ``E_cy`` over concepts too (the loss ``association``); False is the released code.
        steps: Steps of the descent; 0 leaves the concepts where training predicts them.
        step_size: Of Adam, on logits.
        start: A descent begins at what the energies of concepts and classes say one by one (``"amortised"``), or with
            all logits 0, after a correction with the concepts as they were before (``"zero"``, the paper).
        weights: Of ``E_xy``, ``E_xc`` (summed over the concepts) and ``E_cy`` in the descent.
        correction_weights: The same once a concept of the sample was corrected.

    Raises:
        ValueError: An argument is out of range, or (from `build`) a concept is real-valued.

    Example:
        >>> bottleneck = EnergyBottleneck(embedding_size=16)
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "round"]), num_classes=3)
        >>> output = bottleneck.eval()(Features(torch.randn(4, 8)))
        >>> output.values.shape, output.label_logits.shape
        (torch.Size([4, 2]), torch.Size([4, 3]))
    """

    owns_label = True

    def __init__(
        self,
        embedding_size: int = 512,
        dropout: float = 0.2,
        flip_samples: float = 0.2,
        flip_concepts: float = 0.2,
        associate: bool = True,
        steps: int = 20,
        step_size: float = 0.1,
        start: Literal["amortised", "zero"] = "amortised",
        weights: Sequence[float] = (1.0, 1.0, 0.01),
        correction_weights: Sequence[float] = (0.0, 1.0, 3.0),
    ) -> None:
        super().__init__()
        if embedding_size < 1:
            raise ValueError(f"embedding_size: expected at least 1, got {embedding_size}")
        for name, share in {"flip_samples": flip_samples, "flip_concepts": flip_concepts}.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}: expected a share in [0, 1], got {share}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        if steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {steps}")
        if not 0.0 < step_size < math.inf:
            raise ValueError(f"step_size: expected a positive number, got {step_size}")
        if start not in ("amortised", "zero"):
            raise ValueError(f"start: expected 'amortised' or 'zero', got {start!r}")
        self.embedding_size, self.steps, self.step_size, self.start = embedding_size, steps, step_size, start
        self.flip_samples, self.flip_concepts = flip_samples, flip_concepts
        self.associate = associate
        self.dropout = nn.Dropout(dropout)
        self.weights = _checked("weights", weights)
        self.correction_weights = _checked("correction_weights", correction_weights)

    def default_head(self) -> LabelHead:
        """The head that hands on the label logits."""
        head: LabelHead = PassThroughHead()
        return head

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make embeddings and maps."""
        if concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"concepts {real} are real-valued; an embedding is mixed by a probability. Use LinearBottleneck"
            )
        self.concepts = concepts
        self.layout = ValueLayout(len(concepts))
        self.activation = ConceptActivation(concepts)
        count, size = len(concepts), self.embedding_size
        self.to_class = nn.Linear(dims.pooled, size)
        self.to_concepts = nn.Linear(dims.pooled, size)
        self.to_joint = nn.Linear(count * size, size)
        self.class_embeddings = nn.Parameter(torch.randn(num_classes, size))
        self.concept_embeddings = nn.Parameter(torch.randn(count, 2, size))  # absent, present
        bound = size**-0.5
        self.class_weight = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.concept_weight = nn.Parameter(torch.empty(count, size).uniform_(-bound, bound))
        self.joint_weight = nn.Parameter(torch.empty(size).uniform_(-bound, bound))

    def joint_terms(self) -> JointTerms:
        """What ``E_cy`` is made of, in single precision at least."""
        with full_precision(self.concept_embeddings):
            blocks = exact(self.to_joint.weight).unflatten(1, (len(self.concepts), self.embedding_size))
            rows = torch.einsum("hkg,kcg->ckh", blocks, exact(self.concept_embeddings))
            return JointTerms(exact(self.class_embeddings), exact(self.to_joint.bias), rows, exact(self.joint_weight))

    def terms(self, features: Features) -> EnergyTerms:
        """What the energies of features are made of, in single precision at least."""
        with full_precision(features.pooled):
            pooled = features.pooled.to(self.to_class.weight.dtype)
            relevant, evident = (exact(self.dropout(m(pooled))).relu() for m in (self.to_class, self.to_concepts))
            weight, (absent, present) = exact(self.concept_weight), exact(self.concept_embeddings).unbind(1)
            return EnergyTerms(
                relevant * exact(self.class_weight),
                evident @ weight.T,
                torch.stack([evident @ (weight * absent).T, evident @ (weight * present).T], -1),
                torch.stack([(a * b).sum(-1) for a, b in ((absent, absent), (absent, present), (present, present))], 1),
                self.joint_terms(),
            )

    def joint_energies(self, concepts: Tensor) -> Tensor:
        """``[M, L]`` ``E_cy`` of concept vectors ``[M, K]`` in [0, 1] with each class."""
        with full_precision(self.concept_embeddings):
            terms = self.joint_terms()
            return terms.energies(concepts.to(terms.bias))

    def input_energies(self, output: ConceptOutput) -> tuple[Tensor, Tensor]:
        """``[B, L]`` ``E_xy`` of the classes and ``[B, K, 2]`` ``E_xc`` of the concepts, absent and present."""
        with full_precision(output.logits):
            terms = self.terms(output.features)
            return terms.class_energies(), terms.concept_energies()

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """The minimum of each energy on its own."""
        with full_precision(features.pooled):
            terms = self.terms(features)
            absent, present = terms.concept_energies().unbind(-1)
            logits, label_logits = absent - present, -terms.class_energies()
        probs = self.activation(logits)
        none = torch.zeros_like(probs, dtype=torch.bool)
        extras = {"corrected": none, "removed": none, "refined": none[:, 0]}
        return ConceptOutput(features, logits, probs, probs, label_logits=label_logits, extras=extras)

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Hold corrected concepts where they are put; `refine` moves the rest."""
        mask, told, logits = intervention.mask, intervention.values, intervention.logits
        removed = mask & told.isnan()
        if logits is None:
            told = told.nan_to_num(nan=0.5).to(output.probs.dtype)
            # within a group no evidence for another member may outweigh what is told
            most = torch.where(self.activation.categorical, DECIDED, CERTAIN)
            logits = told.logit().clamp(-most, most)
        else:
            told = self.activation(logits)
        kept = mask & ~removed
        probs = torch.where(kept, told.to(output.probs.dtype), output.probs)
        taken_out = torch.where(mask, removed, output.extras["removed"])
        extras = {
            "corrected": output.extras["corrected"] | mask,
            "removed": taken_out,
            "refined": output.extras["refined"] & ~mask.any(-1),
        }
        return output.replace(
            logits=torch.where(kept, logits.to(output.logits.dtype), output.logits),
            probs=probs,
            values=probs.masked_fill(taken_out, 0.0),
            extras=extras,
        )

    def refine(self, output: ConceptOutput, head: nn.Module, intervention: Intervention | None) -> ConceptOutput:
        """Descend to the point of lowest energy; samples that are there already stay as they are."""
        removed, refined = output.extras["removed"], output.extras["refined"].unsqueeze(-1)
        with full_precision(output.logits):
            origin, probs, values = exact(output.logits), exact(output.probs), exact(output.values)
            terms = self.terms(output.features)
            held = Held(output.extras["corrected"], probs, removed)
            weights = self._weights_of(held)
            with torch.no_grad():
                found = descend(
                    terms,
                    self._start(terms, origin, held, weights),
                    held,
                    weights,
                    self.activation,
                    steps=self.steps,
                    step_size=self.step_size,
                    exclusive=getattr(head, "task", "multiclass") != "multilabel",
                )
            # what is found passes on the gradient of where the descent began
            logits = torch.where(refined, origin, origin + (found.logits - origin).detach())
            moved = mixture(logits, held, self.activation)
            probs = torch.where(refined, probs, moved)
            values = torch.where(refined, values, moved.masked_fill(removed, 0.0))
            label_logits = -_class_energies(terms, values, removed, weights)
        extras = {**output.extras, "refined": torch.ones_like(output.extras["refined"])}
        return output.replace(logits=logits, probs=probs, values=values, label_logits=label_logits, extras=extras)

    def _weights_of(self, held: Held) -> Tensor:
        """``[B, 3]`` of the energies: other ones where a concept is corrected."""
        plain, corrected = (held.probs.new_tensor(weights) for weights in (self.weights, self.correction_weights))
        # what is taken out says nothing that the rest should follow
        told = held.mask & ~held.removed
        return torch.where(told.any(-1, keepdim=True), corrected, plain)

    def _start(self, terms: EnergyTerms, logits: Tensor, held: Held, weights: Tensor) -> Point:
        """Where the descent begins, see ``start``."""
        if self.start == "zero":
            told = held.mask.any(-1, keepdim=True)
            return Point(torch.where(told, logits, 0.0), torch.zeros_like(terms.class_energies()))
        absent, present = terms.concept_energies().unbind(-1)
        logits = torch.where(held.mask, logits, absent - present)
        probs = mixture(logits, held, self.activation)
        return Point(logits, -_class_energies(terms, probs, held.removed, weights))

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss, and how well ``E_cy`` explains annotated concepts and label.

        ``coherence`` is the label loss of ``E_cy`` with the annotated concepts, of which some are flipped in training
        steps; ``association`` the concept loss of ``p(c_k | c_-k, y)``. Where a concept is not annotated, its
        prediction stands in.
        """
        concepts = batch["concepts"].to(output.probs)
        known = torch.where(concepts.isnan(), output.probs.detach(), concepts)
        seen = known
        if self.generator is not None:
            seen = torch.where(self._flips(known, self.generator), 1.0 - known, known)
        logits = context.head(output.replace(label_logits=-self.joint_energies(seen)))
        found = super().losses(output, batch, context)
        found["coherence"] = context.label_loss(logits, batch["label"])
        if self.associate:
            found["association"] = context.concept_loss(self.association(known, batch["label"]), concepts)
        return found

    def association(self, concepts: Tensor, label: Tensor) -> Tensor:
        """``[B, K]`` logits of each concept given all others and the label: ``E_cy(absent) - E_cy(present)``.

        Args:
            concepts: ``[B, K]`` in [0, 1].
            label: ``[B]`` classes, or ``[B, L]`` in {0, 1} of several labels.
        """
        with full_precision(self.concept_embeddings):
            terms = self.joint_terms()
            change = terms.rows[1] - terms.rows[0]
            probs = concepts.to(change)
            own = probs.unsqueeze(-1) * change
            if self.activation.has_groups:
                # where a member of a group is present or absent, none of its alternatives is present
                members = self.activation.membership.to(own)
                group = torch.einsum("kg,jg,bjh->bkh", members, members, own)
                own = torch.where(self.activation.categorical.unsqueeze(-1), group, own)
            absent = terms.hidden(probs).unsqueeze(1) - own
            classes = label if label.ndim == 2 else nn.functional.one_hot(label.long(), len(terms.classes))
            classes = classes.to(change)
            weight = terms.weight * (classes.sum(-1, keepdim=True) + classes @ terms.units())
            logits: Tensor = torch.einsum("bkh,bh->bk", absent.relu() - (absent + change).relu(), weight)
            return logits

    def _flips(self, concepts: Tensor, generator: torch.Generator) -> Tensor:
        """``[B, K]`` bool: some samples, and the same concepts in each of them."""
        chosen = []
        for count, share in zip(concepts.shape, (self.flip_samples, self.flip_concepts), strict=True):
            rows = torch.zeros(count, dtype=torch.bool)
            rows[torch.randperm(count, generator=generator)[: math.ceil(share * count)]] = True
            chosen.append(rows)
        return (chosen[0].unsqueeze(1) & chosen[1]).to(concepts.device)

    def concepts_given_label(self, concepts: Tensor) -> Tensor:
        """``[L, K]`` ``p(c_k | y)``, see `ecbm_conditionals.concepts_given_label`.

        Args:
            concepts: ``[N, K]`` predicted (or annotated) concepts of a data set, from which candidates come.
        """
        return concepts_given_label(self, self._observed(concepts))

    def concepts_given_label_and_concept(self, concepts: Tensor, label: int) -> Tensor:
        """``[K, K]`` ``p(c_k | y, c_j)`` in row ``j``, see `ecbm_conditionals.concepts_given_label_and_concept`."""
        return concepts_given_label_and_concept(self, self._observed(concepts), label)

    def _observed(self, concepts: Tensor) -> Candidates:
        """The vectors of a data set; of a categorical group the likeliest member holds, even below one half."""
        return Candidates.observed(self.activation.harden(concepts))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No automatic mixed precision inside the block: energies are differences of sums of many numbers."""
    return torch.autocast(x.device.type, enabled=False)


def exact(x: Tensor) -> Tensor:
    """In single precision, or double where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _class_energies(terms: EnergyTerms, probs: Tensor, removed: Tensor, weights: Tensor) -> Tensor:
    """``[B, L]`` the weighted mean of ``E_xy`` and ``E_cy``."""
    own, joint = (weights[:, [i]] / weights[:, [0, 2]].sum(-1, keepdim=True) for i in (0, 2))
    return own * terms.class_energies() + joint * terms.joint.energies(probs, removed)


def _checked(name: str, weights: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(weight) for weight in weights)
    if len(found) != 3 or not all(0.0 <= weight < math.inf for weight in found) or found[0] + found[2] == 0.0:
        raise ValueError(
            f"{name}: expected three numbers of at least 0, for E_xy, E_xc and E_cy, the first or the last above 0 so "
            f"that something says which class it is; got {list(weights)}"
        )
    return found
