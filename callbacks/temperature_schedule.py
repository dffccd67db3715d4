"""Temperatures that fall while a model trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cbm_lightning.sparsity.schedules import RampName, between, check_ramp

Interval = Literal["epoch", "step"]


class TemperatureSchedule(Callback):
    """Moves the temperature of relaxed draws (Gumbel-softmax, binary concrete, hard-concrete gates) over the training.

    Temperatures are buffers of the model, so a checkpoint has them, and follow from the epoch or ``global_step`` alone,
    so a resumed run continues where it was. The defaults are those of SCBM (Vandenhirtz et al. 2024): in epoch ``e`` of
    ``E`` the temperature is ``max(0.5 ** (e / E), 0.5)``.

    Args:
        buffers: Patterns of buffer names (``*`` matches dots too).
        first: Before the ramp, above 0.
        last: After it, above 0.
        mode: ``"exponential"``, ``"linear"``, ``"cosine"``, ``"cubic"`` or ``"constant"``, see `schedules.ramp`.
        begin: Share of the training at which the ramp begins.
        end: Share at which it ends.
        interval: Move every ``"epoch"`` or every optimizer ``"step"``.

    Raises:
        ValueError: A number is out of range; in ``setup``, no buffer matches (the message lists them all) or one is no
            number; when training starts, it has no end.

    Example:
        >>> schedule = TemperatureSchedule("bottleneck.gates.temperature", first=2.0, last=0.5, interval="step")
    """

    def __init__(
        self,
        buffers: str | Sequence[str] = "bottleneck.*temperature",
        first: float = 1.0,
        last: float = 0.5,
        mode: RampName = "exponential",
        begin: float = 0.0,
        end: float = 1.0,
        interval: Interval = "epoch",
    ) -> None:
        check_ramp(begin, end, mode)
        for name, value in {"first": first, "last": last}.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive temperature, got {value}")
        if interval not in get_args(Interval):
            raise ValueError(f"interval: expected one of {get_args(Interval)}, got {interval!r}")
        self.patterns = [buffers] if isinstance(buffers, str) else list(buffers)
        if not self.patterns:
            raise ValueError("buffers: expected one or more patterns of names, got none")
        self.first, self.last, self.mode = first, last, mode
        self.begin, self.end, self.interval = begin, end, interval
        self._names: list[str] = []
        self._total = math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the temperatures."""
        if stage != "fit":
            return
        known = dict(pl_module.named_buffers())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"buffers: nothing matches {pattern!r}; the buffers are {list(known)}")
        self._names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        if wrong := [name for name in self._names if known[name].numel() != 1 or not known[name].is_floating_point()]:
            raise ValueError(f"buffers: expected single floating-point numbers, {wrong} are none")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how long the training is."""
        of_epochs = float(trainer.max_epochs) if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
        self._total = of_epochs if self.interval == "epoch" else float(trainer.estimated_stepping_batches)
        if not 0 < self._total < math.inf:
            limit = "max_epochs" if self.interval == "epoch" else "max_epochs or max_steps"
            raise ValueError(f"TemperatureSchedule: shares of the training need {limit} in the Trainer")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move; at each batch, for an epoch that a run is resumed at has no other beginning."""
        now = trainer.current_epoch if self.interval == "epoch" else trainer.global_step
        self._move(pl_module, now / self._total)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log ``train/temperature``, by name where a Trainer has several schedules."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        alone = sum(isinstance(callback, TemperatureSchedule) for callback in callbacks) == 1
        name = "train/temperature" if alone else f"train/temperature/{self._names[0]}"
        pl_module.log(name, pl_module.get_buffer(self._names[0]), sync_dist=True)

    def temperature_at(self, fraction: float) -> float:
        """The temperature after a share of the training."""
        return between(self.first, self.last, min(fraction, 1.0), self.begin, self.end, self.mode)

    def _move(self, pl_module: LightningModule, fraction: float) -> None:
        with torch.no_grad():
            for name in self._names:
                buffer: Tensor = pl_module.get_buffer(name)
                buffer.fill_(self.temperature_at(fraction))
