"""Leakage: do predicted concepts carry more than the concepts they are named after?"""

from cbm_lightning.metrics.leakage.completeness import Completeness, completeness, completeness_score, concept_shap
from cbm_lightning.metrics.leakage.concept_task_leakage import (
    ConceptTaskLeakage,
    InterConceptLeakage,
    concept_task_leakage,
    inter_concept_leakage,
)
from cbm_lightning.metrics.leakage.conditional_information import ConditionalLeakage, conditional_information
from cbm_lightning.metrics.leakage.evidence import (
    Evidence,
    Measurement,
    Splits,
    cross_splits,
    given_splits,
    representation,
)
from cbm_lightning.metrics.leakage.head_on_truth import HeadOnTruth, ceiling_gap, head_on_truth
from cbm_lightning.metrics.leakage.mutual_information import entropy, mutual_information
from cbm_lightning.metrics.leakage.niche_impurity import NicheImpurity, niche_impurity, niche_impurity_score
from cbm_lightning.metrics.leakage.oracle_impurity import OracleImpurity, oracle_impurity, oracle_impurity_score

__all__ = [
    "ConceptTaskLeakage",
    "InterConceptLeakage",
    "ConditionalLeakage",
    "HeadOnTruth",
    "OracleImpurity",
    "NicheImpurity",
    "Completeness",
    "Evidence",
    "Measurement",
    "Splits",
    "cross_splits",
    "given_splits",
    "representation",
    "concept_task_leakage",
    "inter_concept_leakage",
    "conditional_information",
    "head_on_truth",
    "ceiling_gap",
    "oracle_impurity",
    "oracle_impurity_score",
    "niche_impurity",
    "niche_impurity_score",
    "completeness",
    "completeness_score",
    "concept_shap",
    "entropy",
    "mutual_information",
]
