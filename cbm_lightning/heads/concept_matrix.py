"""A head that is never trained: which class reads, concept by concept, like the image does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbm_lightning.backbones.text import OpenClipTextEncoder
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads.base import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ClassFacts, ConceptOutput, Contributions, FeatureDims, ValueLayout

Matching = Literal["cosine", "cubed", "max", "correlation"]


class ConceptMatrixHead(LabelHead):
    """Concept Matrix Search: classifies without training, by texts alone (Semenov et al., Sparse-CBM, 2024).

    An image has a row ``V [K]`` of similarities with the concept texts, which is what the bottleneck lays out
    (`SimilarityBottleneck` with ``standardize: false`` and ``scale: 1``), and a class has one too, the signature
    ``T [K]``: the cosines of its own text with the concept texts. The class whose row is most like the image's is the
    prediction. There is nothing to fit: ``cbm test`` is all that it takes. The signatures are a buffer of the
    checkpoint, so that no text encoder is needed afterwards.

    Corrections by 0 or 1 say little here: without training nobody knows which similarities stand for them, and the
    bottleneck sets its first guess, -5 or 5, which outweighs every cosine.

    The paper divides the rows by their sums first. That cancels in the first two measures as long as the sums are
    positive, and turns the order around where they are negative, so we leave it out there; ``max`` divides the
    signatures by the sums of their sizes, which is the same for positive ones.

    Args:
        text_encoder: Encodes class and concept texts at construction; take it and the backbone from one model. Class
            texts are the descriptions of the datamodule as they are, or else the class names in the encoder's
            templates. Without an encoder the data must bring ``class_embeddings``, and its concept set ``embeddings``.
        similarity: ``"cosine"`` of the rows; ``"cubed"``, the cosine of their third powers, in which concepts that
            stand out count more; ``"max"``, the entry of the one concept that the image has most of; or, not in the
            paper, ``"correlation"``, the cosine of centred rows, for a level that all cosines of a CLIP model share
            says nothing of the class.
        scale: Factor on the similarity, which makes the probabilities surer and changes no prediction.

    Raises:
        ValueError: ``similarity`` is unknown or ``scale`` not positive. From `build`, the label is of several classes
            at once, the values are no single number a concept, or embeddings do not fit classes or concepts.
        RuntimeError: From `forward`, there never were signatures: neither encoded, nor given, nor loaded.

    Example:
        >>> head = ConceptMatrixHead(similarity="cosine", scale=1.0)
        >>> concepts = ConceptSet(["red", "round"], embeddings=torch.eye(2))
        >>> head.introduce(concepts, ClassFacts(embeddings=torch.tensor([[1.0, 0.0], [0.6, 0.8]])))
        >>> head.build(FeatureDims(2), ValueLayout(concepts=2), num_classes=2, task="multiclass")
        >>> head.classify(torch.tensor([[0.3, 0.4]]), None)
        tensor([[0.6000, 1.0000]])
    """

    signatures: Tensor

    def __init__(
        self, text_encoder: OpenClipTextEncoder | None = None, similarity: Matching = "cosine", scale: float = 100.0
    ) -> None:
        super().__init__()
        if similarity not in get_args(Matching):
            raise ValueError(f"similarity: expected one of {get_args(Matching)}, got {similarity!r}")
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        # the encoder is only needed once, so it is no submodule: its weights stay out of the checkpoint
        self._encode = None if text_encoder is None else text_encoder.encode
        self._found: Tensor | None = None
        self.similarity = similarity
        self.scale = scale

    def portable_init_args(self) -> dict[str, Any]:
        """Without the encoder: the checkpoint brings the signatures."""
        return {**super().portable_init_args(), "text_encoder": None}

    def introduce(self, concepts: ConceptSet, classes: ClassFacts) -> None:
        """Compare the texts of the classes with those of the concepts."""
        encode, self._encode, self._init_args["text_encoder"] = self._encode, None, None
        if encode is None:
            of_classes, of_concepts = classes.embeddings, concepts.embeddings
        else:
            of_classes, of_concepts = class_vectors(encode, classes), encode(concepts.prompts())
        if of_classes is None or of_concepts is None:
            return
        if of_classes.ndim != 2 or of_classes.shape[1] != of_concepts.shape[1]:
            raise ValueError(
                f"class_embeddings: expected [L, {of_concepts.shape[1]}], as wide as the texts of the concepts, got "
                f"{list(of_classes.shape)}; take both from one model"
            )
        rows, columns = (normalize(x.detach().float(), dim=-1) for x in (of_classes, of_concepts))
        self._found = rows @ columns.T

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Keep the signatures; there are no parameters."""
        super().build(dims, layout, num_classes, task)
        if task == "multilabel":
            raise ValueError(
                "task: ConceptMatrixHead finds the one class that is nearest; how near is near enough for one of "
                "several labels would have to be learned, use LinearHead"
            )
        if (layout.width, layout.extra) != (1, 0):
            raise ValueError(
                f"head: ConceptMatrixHead reads one similarity a concept, and this bottleneck lays out {layout.width} "
                f"numbers a concept and {layout.extra} free ones; use SimilarityBottleneck"
            )
        expected = (num_classes, layout.concepts)
        if self._found is not None and self._found.shape != expected:
            raise ValueError(
                f"class_embeddings: expected a row a class, {num_classes} rows, got {len(self._found)} (for "
                f"{self._found.shape[1]} of {layout.concepts} concepts)"
            )
        found, self._found = self._found, None
        self.register_buffer("signatures", torch.zeros(expected) if found is None else found)
        self._ready = found is not None

    def classify(self, values: Tensor, output: ConceptOutput | None) -> Tensor:
        """``[..., K]`` similarities to ``[..., L]`` logits; for a binary label, how much nearer the second class is."""
        self._check_ready()
        with torch.autocast(values.device.type, enabled=False):
            logits = self.scale * self._image_rows(values) @ self._class_rows().T
        return logits[..., 1:] - logits[..., :1] if self.task == "binary" else logits

    def contributions(self, output: ConceptOutput) -> Contributions | None:
        """Image entry times class entry, of the rows as they are compared; they add up to the logits exactly."""
        if output.label_logits is not None or output.sample_dim or output.time_dim:
            return None
        self._check_ready()
        each = self.scale * self._image_rows(output.values)[:, None] * self._class_rows()
        return Contributions(each[:, 1:] - each[:, :1] if self.task == "binary" else each, {})

    def _image_rows(self, values: Tensor) -> Tensor:
        """``[..., K]``, of length 1; with ``max`` a one at the largest entry and zeros elsewhere."""
        rows = values.float()
        if self.similarity == "max":
            return torch.nn.functional.one_hot(rows.argmax(-1), rows.shape[-1]).to(rows)
        return normalize(self._shaped(rows), dim=-1)

    def _class_rows(self) -> Tensor:
        """``[L, K]``, of length 1; with ``max`` the sizes of a row sum to 1."""
        rows = self.signatures.float()
        if self.similarity == "max":
            return normalize(rows, p=1.0, dim=-1)
        return normalize(self._shaped(rows), dim=-1)

    def _shaped(self, rows: Tensor) -> Tensor:
        match self.similarity:
            case "cubed":
                # third powers of cosines are tiny: scaled to a largest entry of 1 first, they do not underflow
                return (rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-12)).pow(3)
            case "correlation":
                return rows - rows.mean(-1, keepdim=True)
            case _:
                return rows

    def _check_ready(self) -> None:
        self._ready = self._ready or bool(self.signatures.any())  # loaded from a checkpoint since
        if not self._ready:
            raise RuntimeError(
                "the class texts were never encoded: pass text_encoder, or data with class_embeddings and a concept "
                "set with embeddings, or load a checkpoint before the first batch"
            )


def class_vectors(encode: Callable[..., Tensor], classes: ClassFacts) -> Tensor:
    """``[L, D]`` vectors of the classes: of their descriptions, which are sentences already, or of their names.

    Raises:
        ValueError: There are neither.
    """
    if classes.descriptions is not None:
        return encode(classes.descriptions, templates=["{}"])
    if classes.names is None:
        raise ValueError(
            "class_names: a text encoder has nothing to encode; pass model.class_names, or a datamodule that knows them"
        )
    return encode(classes.names)
