"""Label heads: concepts to classes."""

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.heads.concept_matrix import ConceptMatrixHead
from cbm_lightning.heads.linear import LinearHead
from cbm_lightning.heads.mlp import MLPHead
from cbm_lightning.heads.normalized import NormalizedHead
from cbm_lightning.heads.pass_through import PassThroughHead
from cbm_lightning.heads.prototype import PrototypeHead
from cbm_lightning.heads.residual import ResidualHead

__all__ = [
    "LabelHead",
    "LinearHead",
    "MLPHead",
    "ResidualHead",
    "PrototypeHead",
    "NormalizedHead",
    "ConceptMatrixHead",
    "PassThroughHead",
]
