"""Training in phases under a stock Trainer: one optimizer, a parameter group a part, schedulers a phase."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cbm_lightning.batches import check_concepts, read_batch
from cbm_lightning.checkpoints import PortableModule
from cbm_lightning.data_facts import check_agreement
from cbm_lightning.optimization import ClassSpec, check_positive, check_weights, make_optimizer, make_scheduler
from cbm_lightning.phases import PARTS, Phase, make_phases, phase_starts
from cbm_lightning.types import Batch, ConceptOutput

if TYPE_CHECKING:
    from cbm_lightning.bottlenecks import Bottleneck
    from cbm_lightning.concepts import ConceptSet
    from cbm_lightning.losses import ConceptLoss

EVALUATION = Phase("evaluation")


class PhasedTraining(PortableModule):
    """Phases, optimizer, schedulers and the statistics fitted on training data; the other half of `CBMModule`.

    Which phase an epoch belongs to follows from the epoch alone, so a resumed run continues in the middle of one.
    """

    bottleneck: Bottleneck
    concept_loss: ConceptLoss
    concept_set: ConceptSet
    num_classes: int
    loss_weights: dict[str, float]
    phase: Phase = EVALUATION

    def configure_training(
        self,
        phases: str | Sequence[Phase | Mapping[str, Any]],
        lr: float,
        lr_multipliers: Mapping[str, float] | None,
        weight_decay: float,
        optimizer: ClassSpec,
        lr_scheduler: ClassSpec | None,
        monitor: str | None,
    ) -> None:
        """Check and keep the settings; called once by ``__init__``."""
        check_positive(lr=lr)
        self.phases = make_phases(phases)
        self.lr = lr
        self.lr_multipliers = check_weights("lr_multipliers", lr_multipliers)
        if unknown := set(self.lr_multipliers) - set(PARTS):
            raise ValueError(f"lr_multipliers: expected parts of {PARTS}, got {sorted(unknown)}")
        self.weight_decay = check_weights("weight_decay", {"all": weight_decay})["all"]
        self.optimizer_spec, self.scheduler_spec, self.monitor = optimizer, lr_scheduler, monitor
        make_optimizer(optimizer, [{"params": [nn.Parameter(torch.zeros(1))]}], lr, weight_decay)  # fails here, not in fit
        self._starts: list[int] = [0] * len(self.phases)
        self._scheduler: LRScheduler | None = None
        self._trainable: set[nn.Parameter] = set()
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    # ---------------------------------------------------------------- before training

    def setup(self, stage: str) -> None:
        """Check data, phases and monitors against each other before anything trains."""
        self.phase = EVALUATION
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_agreement(data, self.concept_set, self.num_classes)
        if stage != "fit":
            return
        # a fast_dev_run has one epoch, enough for the first phase
        dry = bool(self.trainer.fast_dev_run)
        self._starts = list(range(len(self.phases))) if dry else phase_starts(self.phases, self.trainer.max_epochs)
        self._check_strategy()
        self._check_monitors()
        if self.concept_loss.needs_annotations:
            self.concept_loss.fit(self._training_annotations(data))
        self.phase = self.phases[0]

    def _check_strategy(self) -> None:
        strategy = self.trainer.strategy
        unused_allowed = not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters", False)
        if len(self.phases) > 1 and not unused_allowed:
            raise ValueError(
                f"phases {[phase.name for phase in self.phases]} leave parameters unused in turn, which plain DDP cannot "
                "follow; set the Trainer's strategy to 'ddp_find_unused_parameters_true'"
            )

    def _check_monitors(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is None or not isinstance(callback, (Checkpoint, EarlyStopping)):
                continue
            name = monitor.partition("/")[2]
            for phase in self.phases:
                off = {loss for loss, weight in {**self.loss_weights, **phase.loss_weights}.items() if weight == 0}
                unlogged = {f"loss_{loss}" for loss in off} | ({"label_acc"} if "label" in off else set())
                changes = name == "loss" and any(p.loss_weights != phase.loss_weights for p in self.phases)
                if name in unlogged or changes:
                    why = "means another sum in each phase" if changes else f"is not logged in phase {phase.name!r}"
                    raise ValueError(
                        f"{type(callback).__name__} monitors {monitor!r}, which {why}; monitor something that all phases "
                        "log (val/concept_acc, say), or nothing and keep the last checkpoint"
                    )

    def _training_annotations(self, data: Any) -> Tensor:
        """``[N, K]`` annotations of the training set: from the datamodule, or by reading its loader once."""
        if hasattr(data, "annotations"):
            concepts: Tensor = data.annotations("train")[0]
            return concepts
        loader = self.trainer.fit_loop._data_source.dataloader()
        batches: Iterable[Any] = loader if isinstance(loader, Iterable) else []
        found = [self.read_batch(batch).get("concepts") for batch in batches]
        if not found or any(concepts is None for concepts in found):
            raise ValueError("concept_loss: 'balanced' weights need annotated concepts in the training batches; give numbers")
        annotations = torch.cat([concepts.float() for concepts in found if concepts is not None])
        check_concepts(annotations, self.concept_set)
        return annotations

    def read_batch(self, batch: Any) -> Batch:
        """Read what a loader yields as a dict; override it for batches of another form."""
        return read_batch(batch)

    # ---------------------------------------------------------------- optimizer and schedulers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with a group a part, without what is frozen (by the user, or by a callback until it unfreezes)."""
        groups = []
        for name in PARTS:
            parameters = [p for p in self._part(name).parameters() if p.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr": self._lr_of(name, self.phases[0]), "name": name})
        if not groups:
            raise ValueError("nothing to train: every parameter of backbone, bottleneck and head is frozen")
        self._trainable = {p for group in groups for p in group["params"]}  # type: ignore[attr-defined]
        optimizer = make_optimizer(self.optimizer_spec, groups, self.lr, self.weight_decay)
        self._scheduler = None
        if self.scheduler_spec is None:
            return optimizer
        self._scheduler, interval = self._make_scheduler(optimizer, 0)
        config = {"scheduler": self._scheduler, "interval": interval}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {**config, "monitor": self.monitor} if self.monitor else config,  # type: ignore[typeddict-item]
        }

    def _part(self, name: str) -> nn.Module:
        part: nn.Module = getattr(self, name)
        return part

    def _lr_of(self, part: str, phase: Phase) -> float:
        return (self.lr if phase.lr is None else phase.lr) * self.lr_multipliers.get(part, 1.0)

    def _make_scheduler(self, optimizer: Optimizer, index: int) -> tuple[LRScheduler, str]:
        assert self.scheduler_spec is not None
        trainer = self.trainer
        ends = [*self._starts[1:], trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None]
        end = ends[index]
        epochs = None if end is None else end - self._starts[index]
        if epochs is None:
            return make_scheduler(self.scheduler_spec, optimizer, None, 0)
        total = trainer.estimated_stepping_batches
        steps_per_epoch = max(int(total) // (trainer.max_epochs or 1), 1)
        return make_scheduler(self.scheduler_spec, optimizer, epochs, steps_per_epoch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the bottleneck project its parameters."""
        super().optimizer_step(*args, **kwargs)
        self.bottleneck.constrain()

    # ---------------------------------------------------------------- phases

    @property
    def label_matters(self) -> bool:
        """Whether the label loss counts in the current phase."""
        return self.weights_of(["label"])["label"] > 0

    def weights_of(self, names: Iterable[str]) -> dict[str, float]:
        """The factor of each named loss in the current phase; 1 where none was given."""
        given = {**self.loss_weights, **self.phase.loss_weights}
        return {name: given.get(name, 1.0) for name in names}

    def on_train_start(self) -> None:
        """Put frozen parts into evaluation mode before the first batch."""
        self.train()

    def on_train_epoch_start(self) -> None:
        """Restore the randomness of a resumed run, and enter a phase when its first epoch begins."""
        self.restore_randomness()
        index = max(i for i, start in enumerate(self._starts) if start <= self.current_epoch)
        self.phase = self.phases[index]
        for name in PARTS:
            trains = name in self.phase.train
            for parameter in self._part(name).parameters():
                if not trains or parameter in self._trainable:
                    parameter.requires_grad_(trains)
        self.train()
        if self.current_epoch == self._starts[index]:
            self._restart_rates(index)

    def _restart_rates(self, index: int) -> None:
        """Set learning rates and scheduler to the start of a phase, unless a foreign scheduler is at work."""
        configs = self.trainer.lr_scheduler_configs
        ours = [] if self._scheduler is None else [self._scheduler]
        if [config.scheduler for config in configs] != ours:
            return  # the learning rate finder, or a user's own configure_optimizers
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        for group in optimizer.param_groups:
            if group.get("name") in PARTS:
                group["lr"] = group["initial_lr"] = self._lr_of(group["name"], self.phases[index])
        if self._scheduler is not None:
            self._scheduler, configs[0].interval = self._make_scheduler(optimizer, index)  # type: ignore[assignment]
            configs[0].scheduler = self._scheduler  # type: ignore[assignment]

    def train(self, mode: bool = True) -> PhasedTraining:
        """Set the training mode, except for parts that stand still in this phase: their BatchNorm must not move."""
        super().train(mode)
        for name in set(PARTS) - set(self.phase.train):
            self._part(name).eval()
        return self

    def progress(self) -> float:
        """How much of the training is done, in [0, 1]; 0 where it has no end."""
        trainer = self.trainer
        if trainer.max_epochs and trainer.max_epochs > 0:
            within = trainer.fit_loop.epoch_loop.batch_idx / max(trainer.num_training_batches, 1)
            return min((self.current_epoch + within) / trainer.max_epochs, 1.0)
        return min(self.global_step / trainer.max_steps, 1.0) if trainer.max_steps > 0 else 0.0

    def on_fit_end(self) -> None:
        """Return to the state in which every loss counts."""
        self.phase = EVALUATION

    # ---------------------------------------------------------------- statistics of training predictions

    def keep_statistics(self, output: ConceptOutput) -> None:
        """Keep the predictions of a training step if the bottleneck fits statistics on them."""
        if (size := self.bottleneck.statistics_size) > 0:
            self._recent.append((output.logits.detach(), output.probs.detach(), output.values.detach()))
            if len(self._recent) > max(size // max(len(output.logits), 1), 1):
                self._recent.popleft()

    def on_validation_epoch_start(self) -> None:
        """Fit the statistics before checkpoints are written after validation."""
        self._fit_statistics()

    def on_train_epoch_end(self) -> None:
        """Fit the statistics where there was no validation."""
        self._fit_statistics()

    def _fit_statistics(self) -> None:
        if not self._recent or self.trainer.sanity_checking:
            return
        stacked = [torch.cat(column) for column in zip(*self._recent, strict=True)]
        self._recent.clear()
        if self.trainer.world_size > 1:
            stacked = [self.all_gather(column).flatten(0, 1) for column in stacked]  # type: ignore[union-attr]
        self.bottleneck.fit_statistics(*stacked)
