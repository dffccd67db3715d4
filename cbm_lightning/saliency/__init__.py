"""Where each concept looks: concept maps, and how well they are placed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cbm_lightning.saliency.co_occurrence import CoOccurrence, cooccurrence
from cbm_lightning.saliency.maps import class_maps, concept_maps
from cbm_lightning.saliency.methods import (
    ActivationMapping,
    AttentionRollout,
    Auto,
    ExactMaps,
    GradCAM,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    SmoothGrad,
)
from cbm_lightning.saliency.pairs import Pairs, upsample, visible_pairs
from cbm_lightning.saliency.subject import Localisable, NoExactMaps

if TYPE_CHECKING:
    from cbm_lightning.saliency.study import SaliencyResult, SaliencyStudy

__all__ = [
    "SaliencyStudy",
    "SaliencyResult",
    "concept_maps",
    "class_maps",
    "cooccurrence",
    "CoOccurrence",
    "SaliencyMethod",
    "Auto",
    "ExactMaps",
    "ActivationMapping",
    "GradCAM",
    "Gradient",
    "InputXGradient",
    "IntegratedGradients",
    "SmoothGrad",
    "Occlusion",
    "AttentionRollout",
    "Pairs",
    "visible_pairs",
    "upsample",
    "Localisable",
    "NoExactMaps",
]


def __getattr__(name: str) -> Any:
    """Import the study when it is asked for: it needs the metrics, whose functions are here."""
    if name in ("SaliencyStudy", "SaliencyResult"):
        from cbm_lightning.saliency import study

        return getattr(study, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
