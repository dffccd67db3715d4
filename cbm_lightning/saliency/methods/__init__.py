"""Saliency methods: where a concept score comes from, one file each."""

from cbm_lightning.saliency.methods.activation_mapping import ActivationMapping
from cbm_lightning.saliency.methods.attention_rollout import AttentionRollout
from cbm_lightning.saliency.methods.auto import Auto
from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.methods.exact import ExactMaps
from cbm_lightning.saliency.methods.grad_cam import GradCAM
from cbm_lightning.saliency.methods.gradient import Gradient
from cbm_lightning.saliency.methods.input_x_gradient import InputXGradient
from cbm_lightning.saliency.methods.integrated_gradients import IntegratedGradients
from cbm_lightning.saliency.methods.occlusion import Occlusion
from cbm_lightning.saliency.methods.smooth_grad import SmoothGrad

__all__ = [
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
]
