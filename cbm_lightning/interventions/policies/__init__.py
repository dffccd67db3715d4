"""Policies: which concept to ask about next, one file each."""

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.policies.cctp import CCTP
from cbm_lightning.interventions.policies.cloning import BehaviouralCloning
from cbm_lightning.interventions.policies.coop import CooP
from cbm_lightning.interventions.policies.ectp import ECTP
from cbm_lightning.interventions.policies.eudtp import EUDTP
from cbm_lightning.interventions.policies.fixed_order import FixedOrder, GlobalOrder
from cbm_lightning.interventions.policies.global_validation import (
    GlobalGreedy,
    GlobalValidationError,
    GlobalValidationImprovement,
)
from cbm_lightning.interventions.policies.greedy import GreedyOracle
from cbm_lightning.interventions.policies.lcp import LCP
from cbm_lightning.interventions.policies.prior import LearnedPrior
from cbm_lightning.interventions.policies.rand import Rand
from cbm_lightning.interventions.policies.ucp import UCP

__all__ = [
    "Policy",
    "Rand",
    "UCP",
    "LCP",
    "CCTP",
    "ECTP",
    "EUDTP",
    "CooP",
    "GreedyOracle",
    "GlobalOrder",
    "FixedOrder",
    "GlobalValidationError",
    "GlobalValidationImprovement",
    "GlobalGreedy",
    "LearnedPrior",
    "BehaviouralCloning",
]
