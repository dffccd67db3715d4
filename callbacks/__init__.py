"""Lightning callbacks over the packages of cbm_lightning."""

from cbm_lightning.callbacks.concept_conditionals import ConceptConditionals
from cbm_lightning.callbacks.concept_exemplars import ConceptExemplars
from cbm_lightning.callbacks.concept_saliency import ConceptSaliency
from cbm_lightning.callbacks.intervention_evaluation import InterventionEvaluation
from cbm_lightning.callbacks.leakage_report import LeakageReport
from cbm_lightning.callbacks.prediction_table import PredictionTable
from cbm_lightning.callbacks.sparsity_evaluation import SparsityEvaluation
from cbm_lightning.callbacks.sparsity_schedule import SparsitySchedule
from cbm_lightning.callbacks.temperature_schedule import TemperatureSchedule

__all__ = [
    "ConceptExemplars",
    "ConceptConditionals",
    "ConceptSaliency",
    "InterventionEvaluation",
    "LeakageReport",
    "PredictionTable",
    "SparsityEvaluation",
    "SparsitySchedule",
    "TemperatureSchedule",
]
