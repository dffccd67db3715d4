"""Which concept to correct next, to which value, and what the label makes of it."""

from cbm_lightning.interventions.engine import InterventionEngine, Samples
from cbm_lightning.interventions.gaussian import ConfidenceRegionValues
from cbm_lightning.interventions.person import Person
from cbm_lightning.interventions.policies import Policy
from cbm_lightning.interventions.state import State
from cbm_lightning.interventions.study import InterventionStudy
from cbm_lightning.interventions.subject import Intervenable
from cbm_lightning.interventions.units import Units
from cbm_lightning.interventions.values import InterventionValues

__all__ = [
    "ConfidenceRegionValues",
    "InterventionStudy",
    "InterventionEngine",
    "Samples",
    "Person",
    "Policy",
    "State",
    "Intervenable",
    "Units",
    "InterventionValues",
]
