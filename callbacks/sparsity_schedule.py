"""Weights that become exactly zero while a model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from cbm_lightning.sparsity.masks import SUFFIX, apply_masks, attach_mask, mask_of
from cbm_lightning.sparsity.nec import Sparsity
from cbm_lightning.sparsity.penalties import Penalty, PenaltyName, make_penalty
from cbm_lightning.sparsity.pruning import keep_largest
from cbm_lightning.sparsity.schedules import between, check_ramp, ramp
from cbm_lightning.sparsity.step_sizes import step_sizes

Mode = Literal["constant", "linear", "cosine", "cubic", "adaptive"]

# the controller of the adaptive strength: how fast it integrates the excess over the ramp, how it answers at once,
# which keeps it from overshooting, and over how many steps it averages the number of weights, which flickers
INTEGRAL, PROPORTIONAL, MEMORY = 20.0, 0.5, 10


class _Target(NamedTuple):
    """A parameter that becomes sparse."""

    name: str
    parameter: nn.Parameter
    width: int
    penalty: Penalty

    def by_concept(self, x: Tensor) -> Tensor:
        """``[rows, K, m]``: the numbers of a concept together, where a head reads several of each."""
        return x.view(len(x), -1, self.width)


class SparsitySchedule(Callback):
    """Makes parameters sparse during training, with zeros that are exact.

    With the modes ``"constant"``, ``"linear"`` and ``"cosine"`` the strength of a penalty rises over the ramp and is
    then held; ``"adaptive"`` steers it so that the number of effective concepts (NEC) falls to a target. The penalty
    acts as a proximal step after every real step of the optimizer, whatever gradients were accumulated or steps
    skipped before: a subgradient in the loss would never reach zero. ``"cubic"`` needs no penalty: it prunes the
    smallest weights, fast at first, until ``target_nec`` is left (gradual magnitude pruning, Zhu and Gupta 2018); what
    is pruned stays so.

    Weights that have hardly begun to grow cannot show which of them matter: a head that trains from scratch for a few
    epochs wants a larger learning rate than its backbone (``lr_multipliers: {head: 10}``) or a later ``begin``.

    Progress is read off ``trainer.global_step``, so a resumed run continues where it was. What a phase does not train
    is left alone, and shares of the training are those of the phases that train the parameters.

    The proximal step takes the optimizer's own step size for each weight, see `step_sizes`, so that ``strength`` is
    the lambda of ``loss + lambda * penalty`` for SGD, with or without momentum, and for Adam alike; a group of weights
    takes the harmonic mean of theirs. The weight decay of AdamW alone reaches no zero. With 16-bit true precision (not
    mixed) small thresholds are rounded away.

    Args:
        parameters: Patterns of parameter names (``*`` matches dots too); the weights of a linear head by default.
        mode: See above.
        strength: Of the penalty at the end of the ramp; for ``"adaptive"`` at its beginning.
            ``"cubic"`` has no use for it, nor for the penalty and ``alpha``.
        penalty: ``"l1"``, or ``"group"``, which drops whole concepts.
        alpha: Share of that norm; the rest is a ridge (elastic net).
        group_dim: The dimension that tells concepts apart: 1 for a head ``[L, K]``, 0 for a bottleneck's ``[K, D]``.
        target_nec: Non-zero weights a row on average that ``"cubic"`` and ``"adaptive"`` aim at; for a head's rows,
            which are classes, the NEC. With the other modes what is left when ``finetune`` begins.
        begin: Share of the training before the ramp (warm-up).
        end: Share of the training at which the ramp ends.
        finetune: Share of the training, at its end, in which the zeros stay and the other weights train freely; it
            begins by keeping the largest weights only, if there is a ``target_nec``.
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
        if not self.patterns:
            raise ValueError("parameters: expected one or more patterns of names, got none")
        self.mode, self.strength, self.penalty, self.alpha, self.group_dim = mode, strength, penalty, alpha, group_dim
        self.target_nec, self.begin, self.end, self.finetune = target_nec, begin, end, finetune
        self.every_n_steps = every_n_steps
        self._started_with = strength
        self._forget()

    def _forget(self) -> None:
        self._targets: list[_Target] = []
        self._total = 0.0
        self._window = (0.0, 1.0)
        self._frozen = False
        self._average = 0.0
        # what the last step left, which averaged weights do not know
        self._alive: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._copies: list[nn.Module] = []
        self._averaged = False

    @property
    def state_key(self) -> str:
        """Of its own for each schedule of a Trainer."""
        return self._generate_state_key(parameters=self.patterns, mode=self.mode, target_nec=self.target_nec)

    def state_dict(self) -> dict[str, Any]:
        """The strength, which ``"adaptive"`` finds on the way, and the average number of weights that it goes by."""
        return {"strength": self.strength, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the strength over where it does not follow from the step."""
        if self.mode == "adaptive":
            self.strength, self._average = float(state_dict["strength"]), float(state_dict["average"])

    @property
    def masks(self) -> bool:
        """Whether some weights are at some time fixed at zero."""
        return self.mode == "cubic" or self.finetune > 0

    # ---------------------------------------------------------------- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters, and give them masks before a checkpoint brings theirs."""
        if stage != "fit":
            return
        self._forget()
        self.strength = self._started_with
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
        if any(callbacks.index(callback) > callbacks.index(self) for callback in averaging):
            raise ValueError(
                "SparsitySchedule must come after the callback that averages weights, for averages of zeros and "
                "other numbers are not zero; swap them in the list of callbacks"
            )
        # made in the setup of the callback before
        self._copies = [c.module for a in averaging for c in vars(a).values() if isinstance(c, AveragedModel)]
        self._averaged = bool(averaging)
        known = dict(pl_module.named_parameters())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"parameters: nothing matches {pattern!r}; the parameters are {list(known)}")
        found = [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        self._targets = [self._target(name, known[name], pl_module) for name in found]
        for name in found if self.masks else ():
            for model in (pl_module, *self._copies):
                attach_mask(model, name)

    def _target(self, name: str, parameter: nn.Parameter, pl_module: LightningModule) -> _Target:
        """A parameter, checked."""
        if self.penalty == "group" and not -parameter.ndim <= self.group_dim < parameter.ndim:
            raise ValueError(f"group_dim: {name} has the shape {list(parameter.shape)}, got {self.group_dim}")
        width = values_per_concept(name, parameter, pl_module)
        groups = None
        if width > 1 and self.group_dim % parameter.ndim == 1:
            groups = torch.arange(parameter.shape[1]) // width
        target = _Target(name, parameter, width, make_penalty(self.penalty, self.alpha, self.group_dim, groups))
        if self.target_nec is not None:
            if parameter.ndim != 2:
                raise ValueError(f"target_nec: expected weights [rows, columns], {name} is {list(parameter.shape)}")
            if self.target_nec > (columns := target.by_concept(parameter).shape[1]):
                raise ValueError(f"target_nec: {name} has {columns} concepts a row, got {self.target_nec}")
        return target

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which tell of every real step.

        Raises:
            ValueError: The training has no end that shares of it could refer to.
        """
        self._total = float(trainer.estimated_stepping_batches)
        if not 0 < self._total < math.inf:
            raise ValueError(
                "SparsitySchedule: shares of the training need max_epochs or max_steps in the Trainer, and with "
                "max_epochs a loader with a length"
            )
        shares = getattr(pl_module, "training_share", lambda part: (0.0, 1.0))
        found = [shares(target.name.partition(".")[0]) for target in self._targets]
        self._window = min(start for start, _ in found), max(end for _, end in found)
        # a run that is resumed after that moment has its masks from the checkpoint
        self._frozen = self._fraction(trainer.global_step) > 1.0 - self.finetune
        after = partial(self._after_step, trainer, pl_module)
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in trainer.optimizers]
        self._remember(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of optimizers and weights."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def _fraction(self, steps: int) -> float:
        """How much of the parameters' training is done after so many steps, in [0, 1]."""
        start, end = self._window
        return min(max((steps / self._total - start) / (end - start), 0.0), 1.0)

    # ---------------------------------------------------------------- after a step

    def _after_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> None:
        fraction = self._fraction(trainer.global_step + 1)
        due = (trainer.global_step + 1) % self.every_n_steps == 0
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        stepped = [target for target in self._targets if id(target.parameter) in groups]
        if not stepped:
            return
        finetuning = bool(self.finetune) and fraction > 1.0 - self.finetune
        with torch.no_grad():
            excess = self._excess(fraction)
            strength = self.strength_at(fraction) * math.exp(PROPORTIONAL * excess)
            for target in stepped:
                if self.mode == "cubic":
                    self._prune(pl_module, target, fraction, due or fraction >= self.end)
                elif finetuning:
                    self._freeze(pl_module, target)
                elif strength:
                    sizes = step_sizes(optimizer, groups[id(target.parameter)], target.parameter)
                    target.parameter.copy_(target.penalty.prox(target.parameter, sizes * strength))
        self._frozen = self._frozen or finetuning
        if due and fraction >= self.begin and not finetuning:
            steps = self._total * (self._window[1] - self._window[0])
            ramp_steps = max((self.end - self.begin) * steps / self.every_n_steps, 1.0)
            self.strength *= math.exp(INTEGRAL * excess / ramp_steps)
        self._remember(pl_module)

    def strength_at(self, fraction: float) -> float:
        """Strength of the penalty after a share of the training."""
        shape: Any = "constant" if self.mode == "adaptive" else self.mode
        return self.strength * ramp(fraction, self.begin, self.end, shape)

    def _prune(self, pl_module: LightningModule, target: _Target, fraction: float, due: bool) -> None:
        """Keep the weights that are wanted by now; what was pruned stays so."""
        apply_masks(pl_module, [target.name])
        if due and fraction >= self.begin and self.target_nec is not None:
            weight = target.by_concept(target.parameter)
            surplus = weight.shape[1] - self.target_nec
            keep = keep_largest(weight, weight.shape[1] - surplus * ramp(fraction, self.begin, self.end, "cubic"))
            self._mask(pl_module, target, keep.unsqueeze(-1).expand_as(weight))

    def _freeze(self, pl_module: LightningModule, target: _Target) -> None:
        """Keep the zeros: all but the largest weights, or those that the last proximal step left, before this one."""
        if not self._frozen:
            keep = target.by_concept(self._alive[target.name])
            if self.target_nec is not None:
                # by what the optimizer has made of them since, for a single step may have left too few
                weight = target.by_concept(target.parameter)
                keep = keep_largest(weight, self.target_nec).unsqueeze(-1).expand_as(weight)
            self._mask(pl_module, target, keep)
        apply_masks(pl_module, [target.name])

    def _mask(self, pl_module: LightningModule, target: _Target, keep: Tensor) -> None:
        mask_of(pl_module, target.name).copy_(keep.reshape(target.parameter.shape))
        apply_masks(pl_module, [target.name])

    def _excess(self, fraction: float) -> float:
        """Logarithm of how many times too many weights there are, in [-1, 1]; 0 where none are counted.

        What is wanted falls over the ramp, by equal factors, from all weights to the target.
        """
        if self.mode != "adaptive" or self.target_nec is None:
            return 0.0
        alive = [target.by_concept(self._alive[target.name]).any(2) for target in self._targets]
        found = sum(float(each.sum()) / len(each) for each in alive) / len(alive)
        columns = sum(each.shape[1] for each in alive) / len(alive)
        self._average += (found - self._average) / MEMORY if self._average else found
        wanted = between(columns, self.target_nec, fraction, self.begin, self.end, "exponential")
        return min(max(math.log(max(self._average, 1e-2) / wanted), -1.0), 1.0)

    def _remember(self, pl_module: LightningModule) -> None:
        self._alive = {target.name: target.parameter.detach() != 0 for target in self._targets}
        if self.masks and self._averaged:
            self._masks = {target.name: mask_of(pl_module, target.name).clone() for target in self._targets}

    # ---------------------------------------------------------------- averaged weights

    def _zeros(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averaged weights and masks with the zeros of the model that trains; averages of its past have none."""
        found = {name: state[name].where(alive.to(state[name].device), 0.0) for name, alive in self._alive.items()}
        return found | {name + SUFFIX: mask.to(state[name].device) for name, mask in self._masks.items()}

    def _restore_zeros(self, *models: nn.Module) -> None:
        with torch.no_grad():
            for model in models if self._averaged else ():
                state = model.state_dict()
                for name, value in self._zeros(state).items():
                    state[name].copy_(value)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge averaged weights with their zeros."""
        self._restore_zeros(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the zeros, where averaged weights have just replaced the others."""
        self._restore_zeros(pl_module, *self._copies)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save averaged weights with their zeros."""
        if self._averaged:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._zeros(checkpoint["state_dict"])}

    # ---------------------------------------------------------------- report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how sparse the parameters are: ``train/sparsity/{nec,density,lambda}``, by name if there are several."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        alone = sum(isinstance(callback, SparsitySchedule) for callback in callbacks) == 1
        fraction = self._fraction(trainer.global_step)
        if self.mode != "cubic":
            over = bool(self.finetune) and fraction > 1.0 - self.finetune
            prefix = "train/sparsity" if alone else f"train/sparsity/{self._targets[0].name}"
            pl_module.log(f"{prefix}/lambda", 0.0 if over else self.strength_at(fraction), sync_dist=True)
        for target in self._targets:
            weight = target.parameter.detach()
            found = {"density": float((weight != 0).float().mean())}
            if weight.ndim == 2:
                found["nec"] = Sparsity.of(target.by_concept(weight), 0.0).nec
            prefix = "train/sparsity" if alone and len(self._targets) == 1 else f"train/sparsity/{target.name}"
            pl_module.log_dict({f"{prefix}/{key}": value for key, value in found.items()}, sync_dist=True)


def values_per_concept(name: str, parameter: Tensor, pl_module: LightningModule) -> int:
    """How many columns of a parameter belong to one concept: several in a head on concept embeddings, else one."""
    layout = getattr(getattr(pl_module, "head", None), "layout", None)
    if layout is None or layout.extra or not name.startswith("head.") or parameter.ndim != 2:
        return 1
    return int(layout.width) if parameter.shape[1] == layout.size else 1
