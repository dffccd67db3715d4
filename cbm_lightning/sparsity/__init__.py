"""Few concepts a class: penalties that give exact zeros, exact sparse heads, and what their sparsity is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cbm_lightning.sparsity.hard_concrete import HardConcrete
from cbm_lightning.sparsity.nec import Sparsity, nec
from cbm_lightning.sparsity.penalties import ElasticNet, GroupElasticNet, Penalty
from cbm_lightning.sparsity.pruning import keep_largest, keep_top_k
from cbm_lightning.sparsity.report import as_html, as_text, kept_concepts
from cbm_lightning.sparsity.solution import SparseSolution
from cbm_lightning.sparsity.study import NECResult, NECStudy

if TYPE_CHECKING:
    from cbm_lightning.sparsity.elastic_net_path import ElasticNetPath

__all__ = [
    "ElasticNetPath",
    "SparseSolution",
    "nec",
    "Sparsity",
    "keep_largest",
    "keep_top_k",
    "Penalty",
    "ElasticNet",
    "HardConcrete",
    "NECStudy",
    "NECResult",
    "kept_concepts",
    "as_text",
    "as_html",
    "GroupElasticNet",
]


def __getattr__(name: str) -> Any:
    """Import the estimator when it is asked for: scikit-learn takes a second that others need not wait."""
    if name == "ElasticNetPath":
        from cbm_lightning.sparsity.elastic_net_path import ElasticNetPath

        return ElasticNetPath
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
