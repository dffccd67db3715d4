"""Weights that become exactly zero while a model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from cbm_lightning.sparsity.masks import SUFFIX, attach_mask, mask_of
from cbm_lightning.sparsity.nec import Sparsity
from cbm_lightning.sparsity.penalties import Penalty, PenaltyName, make_penalty
from cbm_lightning.sparsity.pruning import keep_largest
from cbm_lightning.sparsity.schedules import check_ramp, ramp

Mode = Literal["constant", "linear", "cosine", "cubic", "adaptive"]

# the controller of the adaptive strength: by the exponential of what it may change within its ramp, and how it answers
# at once to too many weights, which keeps it from overshooting
INTEGRAL, PROPORTIONAL = 8.0, 2.0


class SparsitySchedule(Callback):
    """Makes parameters sparse during training, with zeros that are exact.

    With the modes ``"constant"``, ``"linear"`` and ``"cosine"`` the strength of a penalty rises over the ramp and is
    then held; ``"adaptive"`` steers it towards a number of effective concepts (NEC). The penalty acts as a proximal
    step after every real step of the optimizer, whatever gradients were accumulated or steps skipped before: a
    subgradient in the loss would never reach zero. ``"cubic"`` needs no penalty: it prunes the smallest weights, fast
    at first, until ``target_nec`` is left (gradual magnitude pruning, Zhu and Gupta 2018); what is pruned stays so.

    Progress is read off ``trainer.global_step``, so a resumed run continues where it was. What a phase does not train
    is left alone.

    The proximal step takes the optimizer's own step size for each weight, so that ``strength`` is the lambda of
    ``loss + lambda * penalty`` for all of them: the learning rate of the parameter's group for SGD (with or without
    momentum), ``lr / (sqrt(v) + eps)`` with the bias-corrected second moment ``v`` for Adam, AdamW, NAdam and RAdam,
    and for a group of weights the mean of these. Other optimizers count as SGD. The weight decay of AdamW alone
    reaches no zero. With 16-bit true precision (not mixed) small thresholds are rounded away.

    Args:
        parameters: Patterns of parameter names (``*`` matches dots too); the weights of a linear head by default.
        mode: See above.
        strength: Of the penalty at the end of the ramp; for ``"adaptive"`` at its beginning.
        penalty: ``"l1"``, or ``"group"``, which drops whole concepts.
        alpha: Share of that norm; the rest is a ridge (elastic net).
        group_dim: The dimension that tells concepts apart: 1 for a head ``[L, K]``, 0 for a bottleneck's ``[K, D]``.
        target_nec: Non-zero weights a row on average that ``"cubic"`` and ``"adaptive"`` aim at; for a head's rows,
            which are classes, the NEC. With the other modes what is left when ``finetune`` begins.
        begin: Share of the training before the ramp (warm-up).
        end: Share of the training at which the ramp ends.
        finetune: Share of the training, at its end, in which the zeros stay and the other weights train freely.
        every_n_steps: Prune, or adapt the strength, at every n-th step.

    Raises:
        ValueError: An argument is out of range; in ``setup``, no parameter matches (the message lists them all), one
            has no rows to count, ``target_nec`` exceeds its columns, or averaged weights would undo the zeros.

    Example:
        >>> schedule = SparsitySchedule(mode="adaptive", target_nec=5, finetune=0.2)
    """

    def __init__(
        self,
        parameters: str | Sequence[str] = "head.linear.weight",
        mode: Mode = "cosine",
        strength: float = 1e-3,
        penalty: PenaltyName = "l1",
        alpha: float = 1.0,
        group_dim: int = 1,
        target_nec: float | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        finetune: float = 0.0,
        every_n_steps: int = 1,
    ) -> None:
        check_ramp(begin, end, mode, get_args(Mode))
        if not (strength >= 0 and math.isfinite(strength)) or (mode == "adaptive" and strength == 0):
            raise ValueError(f"strength: expected a number of at least 0 (above 0 to adapt it), got {strength}")
        if target_nec is None and mode in ("cubic", "adaptive"):
            raise ValueError(f"target_nec: mode {mode!r} needs a number of effective concepts to aim at")
        if target_nec is not None and not target_nec > 0:
            raise ValueError(f"target_nec: expected a positive number of effective concepts, got {target_nec}")
        if target_nec is not None and mode not in ("cubic", "adaptive") and not finetune:
            raise ValueError(f"target_nec: mode {mode!r} prunes to it when finetune begins; give finetune a share")
        if not 0.0 <= finetune <= 1.0 - end:
            raise ValueError(f"finetune: expected a share in [0, {1.0 - end:.3g}], after the ramp, got {finetune}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        make_penalty(penalty, alpha)
        self.patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        self.mode, self.strength, self.penalty, self.alpha, self.group_dim = mode, strength, penalty, alpha, group_dim
        self.target_nec, self.begin, self.end, self.finetune = target_nec, begin, end, finetune
        self.every_n_steps = every_n_steps
        self._total: float = 0.0
        self._penalties: dict[str, Penalty] = {}
        # what the last step left, which averaged weights do not know
        self._alive: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._copies: list[nn.Module] = []

    @property
    def state_key(self) -> str:
        """Of its own for each schedule of a Trainer."""
        return self._generate_state_key(parameters=self.patterns, mode=self.mode, target_nec=self.target_nec)

    def state_dict(self) -> dict[str, Any]:
        """The strength, which ``"adaptive"`` finds on the way."""
        return {"strength": self.strength}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the strength over where it is not given by the step."""
        if self.mode == "adaptive":
            self.strength = float(state_dict["strength"])

    @property
    def masks(self) -> bool:
        """Whether some weights are at some time fixed at zero."""
        return self.mode == "cubic" or self.finetune > 0

    # ---------------------------------------------------------------- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters, and give them masks before a checkpoint brings theirs."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
        if any(callbacks.index(callback) > callbacks.index(self) for callback in averaging):
            raise ValueError(
                "SparsitySchedule must come after the callback that averages weights, for averages of zeros and "
                "other numbers are not zero; swap them in the list of callbacks"
            )
        # made in the setup of the callback before
        self._copies = [c.module for a in averaging for c in vars(a).values() if isinstance(c, AveragedModel)]
        known = dict(pl_module.named_parameters())
        found = [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"parameters: nothing matches {pattern!r}; the parameters are {list(known)}")
        for name in found:
            self._check_parameter(name, known[name], pl_module)
            groups = self._groups(name, known[name], pl_module)
            self._penalties[name] = make_penalty(self.penalty, self.alpha, self.group_dim, groups)
            if self.masks:
                for model in (pl_module, *self._copies):
                    attach_mask(model, name)

    def _check_parameter(self, name: str, parameter: nn.Parameter, pl_module: LightningModule) -> None:
        if self.penalty == "group" and not -parameter.ndim <= self.group_dim < parameter.ndim:
            raise ValueError(f"group_dim: {name} has the shape {list(parameter.shape)}, got {self.group_dim}")
        if self.target_nec is None:
            return
        if parameter.ndim != 2:
            raise ValueError(f"target_nec: expected weights [rows, columns], {name} is {list(parameter.shape)}")
        columns = self._by_concept(name, parameter, pl_module).shape[1]
        if self.target_nec > columns:
            raise ValueError(f"target_nec: {name} has {columns} concepts a row, got {self.target_nec}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which tell of every real step.

        Raises:
            ValueError: The training has no end that shares of it could refer to.
        """
        self._total = float(trainer.estimated_stepping_batches)
        if not math.isfinite(self._total):
            raise ValueError("SparsitySchedule: shares of the training need max_epochs or max_steps in the Trainer")
        after = partial(self._after_step, trainer, pl_module)
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in trainer.optimizers]
        self._remember(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of optimizers and weights."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._copies = [], []
        self._penalties, self._alive, self._masks = {}, {}, {}

    # ---------------------------------------------------------------- after a step

    def _after_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> None:
        fraction = (trainer.global_step + 1) / self._total
        due = (trainer.global_step + 1) % self.every_n_steps == 0
        known = dict(pl_module.named_parameters())
        rates = {id(p): (group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        stepped = {name: rates[id(known[name])] for name in self._penalties if id(known[name]) in rates}
        if not stepped:
            return
        with torch.no_grad():
            excess = self._excess(pl_module)
            strength = self.strength_at(fraction) * math.exp(PROPORTIONAL * excess)
            for name, (group, parameter) in stepped.items():
                if fraction > 1.0 - self.finetune or self.mode == "cubic":
                    self._prune(pl_module, name, parameter, fraction, due)
                elif strength:
                    sizes = step_sizes(optimizer, group, parameter)
                    parameter.copy_(self._penalties[name].prox(parameter, sizes * strength))
        if due and self.begin <= fraction <= 1.0 - self.finetune:
            ramp_steps = max((self.end - self.begin) * self._total / self.every_n_steps, 1.0)
            self.strength *= math.exp(INTEGRAL * excess / ramp_steps)
        self._remember(pl_module)

    def strength_at(self, fraction: float) -> float:
        """Strength of the penalty after a share of the training."""
        shape: Any = "constant" if self.mode == "adaptive" else self.mode
        return self.strength * ramp(fraction, self.begin, self.end, shape)

    def _prune(self, pl_module: LightningModule, name: str, parameter: Tensor, fraction: float, due: bool) -> None:
        """Apply the mask, shrunk first where it is its time to."""
        mask = mask_of(pl_module, name)
        parameter.mul_(mask)
        weight = self._by_concept(name, parameter, pl_module)
        keep: Tensor | None = None
        if self.mode == "cubic":
            if due and fraction >= self.begin and self.target_nec is not None:
                columns = weight.shape[1]
                come = ramp(fraction, self.begin, self.end, "cubic")
                keep = keep_largest(weight, columns - (columns - self.target_nec) * come)
        elif bool(mask.all()):
            # the optimizer's step has moved what the last proximal step had made zero
            weight = self._by_concept(name, parameter * self._alive[name], pl_module)
            keep = (weight != 0).any(2) if self.target_nec is None else keep_largest(weight, self.target_nec)
        if keep is not None:
            mask.copy_(keep.unsqueeze(-1).expand_as(weight).reshape(mask.shape))
            parameter.mul_(mask)

    def _excess(self, pl_module: LightningModule) -> float:
        """Logarithm of how many times too many weights the last step left, in [-1, 1]; 0 where none are counted."""
        if self.mode != "adaptive" or self.target_nec is None:
            return 0.0
        alive = [self._by_concept(name, alive, pl_module).any(2) for name, alive in self._alive.items()]
        found = sum(float(each.sum()) / len(each) for each in alive) / len(alive)
        return min(max(math.log(max(found, 1e-2) / self.target_nec), -1.0), 1.0)

    # ---------------------------------------------------------------- averaged weights

    def _remember(self, pl_module: LightningModule) -> None:
        self._alive = {name: pl_module.get_parameter(name) != 0 for name in self._penalties}
        if self.masks:
            self._masks = {name: mask_of(pl_module, name).clone() for name in self._penalties}

    def _restore_zeros(self, state: Mapping[str, Tensor]) -> None:
        """Make weights zero that are zero in the model that trains; averages of its past are not, nor are its masks."""
        with torch.no_grad():
            for name, alive in self._alive.items():
                state[name].mul_(alive.to(state[name].device))
            for name, mask in self._masks.items():
                state[name + SUFFIX].copy_(mask)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge averaged weights with their zeros."""
        self._restore_zeros(pl_module.state_dict())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the zeros, where averaged weights have just replaced the others."""
        for model in (pl_module, *self._copies):
            self._restore_zeros(model.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save averaged weights with their zeros."""
        self._restore_zeros(checkpoint["state_dict"])

    # ---------------------------------------------------------------- report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how sparse the parameters are: ``train/sparsity/{nec,density,lambda}``, by name if there are several."""
        for name in self._penalties:
            parameter = pl_module.get_parameter(name)
            prefix = "train/sparsity" if len(self._penalties) == 1 else f"train/sparsity/{name}"
            if parameter.ndim == 2:
                found = Sparsity.of(self._by_concept(name, parameter.detach(), pl_module), 0.0)
                pl_module.log_dict({f"{prefix}/nec": found.nec, f"{prefix}/density": found.density})
            else:
                pl_module.log(f"{prefix}/density", (parameter != 0).float().mean())
        if self.mode != "cubic":
            fraction = trainer.global_step / self._total
            strength = 0.0 if fraction > 1.0 - self.finetune else self.strength_at(fraction)
            pl_module.log("train/sparsity/lambda", strength)

    # ---------------------------------------------------------------- concepts and columns

    def _by_concept(self, name: str, parameter: Tensor, pl_module: LightningModule) -> Tensor:
        """``[rows, K, m]``: the numbers of a concept together, where a head reads several of each."""
        width = values_per_concept(name, pl_module)
        return parameter.view(len(parameter), -1, width)

    def _groups(self, name: str, parameter: Tensor, pl_module: LightningModule) -> Tensor | None:
        width = values_per_concept(name, pl_module)
        if width == 1 or self.group_dim % parameter.ndim != 1:
            return None
        return torch.arange(parameter.shape[1], device=parameter.device) // width


def values_per_concept(name: str, pl_module: LightningModule) -> int:
    """How many columns of a parameter belong to one concept: several in the head on concept embeddings, else one."""
    layout = getattr(getattr(pl_module, "head", None), "layout", None)
    return int(layout.width) if layout is not None and name.startswith("head.") and not layout.extra else 1


def step_sizes(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> float | Tensor:
    """By what an optimizer multiplied each entry of the (averaged) gradient in the step that it has just made.

    Args:
        optimizer: Has made a step.
        group: The parameter's group.
        parameter: With a state in the optimizer.
    """
    state = optimizer.state[parameter]
    rate = float(group["lr"])
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if not isinstance(second, Tensor) or second.shape != parameter.shape or "betas" not in group:
        return rate
    corrected: Tensor = second / (1.0 - group["betas"][1] ** float(state["step"]))
    sizes: Tensor = rate / (corrected.sqrt() + group["eps"])
    return sizes
