"""Lightning callbacks over the packages of cbm_lightning."""

from cbm_lightning.callbacks.prediction_table import PredictionTable

__all__ = ["PredictionTable"]
