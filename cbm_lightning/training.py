"""Training in phases under a stock Trainer: one optimizer, a parameter group a part, schedulers a phase."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.utilities.distributed import gather_all_tensors

from cbm_lightning.batches import check_concepts, read_batch
from cbm_lightning.checkpoints import PortableModule
from cbm_lightning.data_facts import check_agreement
from cbm_lightning.head_solver import HeadSolver
from cbm_lightning.labels import Task
from cbm_lightning.optimization import (
    ClassSpec,
    check_optimizer,
    check_positive,
    check_scheduler,
    check_weights,
    make_optimizer,
    make_scheduler,
)
from cbm_lightning.phases import PARTS, Phase, make_phases, phase_starts
from cbm_lightning.preflight import (
    check_averaging,
    check_label_reaches,
    check_monitors,
    check_stopping,
    check_strategy,
    check_trains,
)
from cbm_lightning.sparsity.masks import apply_masks, masked, renew_masks
from cbm_lightning.types import Batch, ConceptOutput

if TYPE_CHECKING:
    from cbm_lightning.bottlenecks import Bottleneck
    from cbm_lightning.concepts import ConceptSet
    from cbm_lightning.heads import LabelHead
    from cbm_lightning.losses import ConceptLoss

EVALUATION = Phase("evaluation")
OTHER = "other"


class PhasedTraining(PortableModule):
    """Phases, optimizer, schedulers and the statistics fitted on training data; the other half of `CBMModule`.

    Which phase an epoch belongs to follows from the epoch alone, so a resumed run continues in the middle of one.
    """

    bottleneck: Bottleneck
    head: LabelHead
    concept_loss: ConceptLoss
    concept_set: ConceptSet
    num_classes: int
    task: Task
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
        check_optimizer(optimizer, lr, weight_decay)
        check_scheduler(lr_scheduler, monitor)
        self._starts: list[int] = [0] * len(self.phases)
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._paused: list[nn.Parameter] = []
        self._recent: deque[tuple[Tensor, Tensor]] = deque()
        self._solver: HeadSolver | None = None
        self._masked: list[str] = []

    # ---------------------------------------------------------------- before training

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Bring none, but undo what a failed run left frozen: no other hook comes before callbacks freeze theirs."""
        self._leave_phase()
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Check data, phases and monitors against each other before anything trains."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_agreement(data, None if self.bottleneck.discovers else self.concept_set, self.num_classes)
        if stage != "fit":
            return
        # a fast_dev_run has one epoch, enough for the first phase
        dry = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        self._starts = list(range(len(self.phases))) if dry else phase_starts(self.phases, self.trainer.max_epochs)
        trainable = {name for name in PARTS if any(p.requires_grad for p in self._part(name).parameters())}
        owned = {name: set(self._part(name).parameters()) for name in PARTS}
        if set(self.parameters()) == set().union(*owned.values()):  # what a subclass adds trains in every phase
            check_trains(self.phases, {name for name, parameters in owned.items() if parameters})
        check_strategy(self.trainer.strategy, self.phases, self.loss_weights, trainable)
        check_monitors(self.trainer, self.phases, self.loss_weights, self.monitor)
        check_stopping(self.trainer, self.phases, self._starts)
        check_averaging(self.trainer, self.phases)
        check_label_reaches(self.phases, self.loss_weights, self.bottleneck.needs_label)
        for phase in self.phases:
            if phase.solver:
                self._make_solver(phase)
        if self.concept_loss.needs_annotations or self.bottleneck.needs_annotations:
            annotations = self._training_annotations(data)
            self.concept_loss.fit(annotations)
            if any("bottleneck" in phase.train for phase in self.phases):
                self.bottleneck.fit_annotations(annotations)
        self.phase = self.phases[0]

    def _training_annotations(self, data: Any) -> Tensor:
        """``[N, K]`` annotations of the training set: from the datamodule, or by reading its loader once."""
        if hasattr(data, "annotations"):
            concepts: Tensor = data.annotations("train")[0]
            return concepts
        loader = self.trainer.fit_loop._data_source.dataloader()
        batches: Iterable[Any] = loader if isinstance(loader, Iterable) else []
        found = [self.read_batch(batch).get("concepts") for batch in batches]
        if not found or any(concepts is None for concepts in found):
            raise ValueError(
                "'balanced' weights of the concept_loss, or the bottleneck, need annotated concepts in the training "
                "batches; bring them, or give numbers as weights"
            )
        annotations = torch.cat([concepts.float() for concepts in found if concepts is not None])
        check_concepts(annotations, self.concept_set)
        return annotations

    def read_batch(self, batch: Any) -> Batch:
        """Read what a loader yields as a dict; override it for batches of another form.

        Annotations are left out where the bottleneck discovers concepts of its own.
        """
        content = read_batch(batch)
        if self.bottleneck.discovers:
            content.pop("concepts", None)
        return content

    # ---------------------------------------------------------------- optimizer and schedulers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with a group a part, without what the user froze, or a callback until it unfreezes it."""
        groups = []
        for name in PARTS:
            parameters = [p for p in self._part(name).parameters() if p.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr": self._lr_of(name, self.phases[0]), "name": name})
        inside = {parameter for name in PARTS for parameter in self._part(name).parameters()}
        if others := [p for p in self.parameters() if p.requires_grad and p not in inside]:
            # what a subclass adds trains in every phase
            groups.append({"params": others, "lr": self._lr_of(OTHER, self.phases[0]), "name": OTHER})
        if not groups:
            raise ValueError(
                "nothing to train: every parameter of backbone, bottleneck and head is frozen; test or predict instead"
            )
        self._optimizer = make_optimizer(self.optimizer_spec, groups, self.lr, self.weight_decay)
        if self.scheduler_spec is None:
            return self._optimizer
        self._scheduler, interval = make_scheduler(self.scheduler_spec, self._optimizer, self._phase_steps(0))
        return {
            "optimizer": self._optimizer,
            "lr_scheduler": {"scheduler": self._scheduler, "interval": interval, "monitor": self.monitor},
        }

    def _part(self, name: str) -> nn.Module:
        part: nn.Module = getattr(self, name)
        return part

    def _lr_of(self, part: str, phase: Phase) -> float:
        return (self.lr if phase.lr is None else phase.lr) * self.lr_multipliers.get(part, 1.0)

    def _phase_steps(self, index: int) -> int | None:
        """Optimizer steps of a phase, None if it has no end."""
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # before it the number of batches is unknown
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        an_epoch = math.ceil(batches) if math.isfinite(batches) else math.inf
        limits = [limit if limit and limit > 0 else math.inf for limit in (trainer.max_epochs, trainer.max_steps)]
        start, end = self._starts[index], [*self._starts[1:], limits[0]][index]
        steps = min(end * an_epoch, limits[1]) - (start and start * an_epoch)
        # a phase that the run ends before still gets a schedule
        return max(int(steps), 1) if math.isfinite(steps) else None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Step, then let bottleneck and head project their parameters; where a solver fits, only read the batch."""
        if self._solver is not None:
            optimizer_closure()
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        apply_masks(self, self._masked)
        self.bottleneck.constrain()
        self.head.constrain()

    # ---------------------------------------------------------------- phases

    @property
    def label_matters(self) -> bool:
        """Whether the label loss counts in the current phase."""
        return self.weights_of(["label"])["label"] > 0

    def weights_of(self, names: Iterable[str]) -> dict[str, float]:
        """The factor of each named loss in the current phase; 1 where none was given."""
        given = self.phase.weights(self.loss_weights)
        return {name: given.get(name, 1.0) for name in names}

    def on_train_start(self) -> None:
        """Enter the phase of the first epoch, or of the middle of one where a run is resumed there."""
        self._masked = masked(self)
        self._enter_phase()
        self._solver = self._make_solver(self.phase) if self.phase.solver else None

    def on_train_epoch_start(self) -> None:
        """Restore the randomness of a resumed run, and enter a phase when its first epoch begins."""
        if self.restore_randomness() and (fetcher := self.trainer.fit_loop._data_fetcher) is not None:
            # the iterator was made, and its workers sent for batches, before the sampler was told the epoch
            iter(fetcher)
        self._recent.clear()
        self._enter_phase()
        self._restart_rates(self.current_epoch)
        self._solver = self._make_solver(self.phase) if self.phase.solver else None

    def training_share(self, part: str) -> tuple[float, float]:
        """From which share of the training on, and up to which, a part is trained by gradients.

        Args:
            part: ``backbone``, ``bottleneck`` or ``head``; other parameters train all the time.
        """
        epochs = self.trainer.max_epochs
        if part not in PARTS or not epochs or epochs < 0:
            return 0.0, 1.0
        ends = [*self._starts[1:], epochs]
        spans = [
            (start / epochs, end / epochs)
            for phase, start, end in zip(self.phases, self._starts, ends, strict=True)
            # a fast_dev_run ends before the second phase
            if part in phase.train and not phase.solver and start < end
        ]
        return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else (0.0, 1.0)

    def _make_solver(self, phase: Phase) -> HeadSolver:
        return HeadSolver(phase.solver, self.head, self.concept_set, self.task)

    def _enter_phase(self) -> None:
        self.phase = self.phases[max(i for i, start in enumerate(self._starts) if start <= self.current_epoch)]
        # what the optimizer does not hold was frozen by the user, or by a callback that adds it when it unfreezes
        held = {p for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for name in PARTS:
            for parameter in held.intersection(self._part(name).parameters()):
                parameter.requires_grad_(name in self.phase.train)
        self._paused = [parameter for parameter in held if not parameter.requires_grad]
        self.train()

    def _leave_phase(self) -> None:
        """Return to the state in which every loss counts and every part trains."""
        for parameter in self._paused:
            parameter.requires_grad_(True)
        self._paused, self._optimizer, self._scheduler, self._solver = [], None, None, None
        self._recent.clear()
        self.phase = EVALUATION

    def _restart_rates(self, epoch: int) -> None:
        """Set learning rates and scheduler to the start of the phase that begins with an epoch, if one does.

        Not while the learning rate finder is at work, nor where a user's own ``configure_optimizers`` made them.
        """
        configs = self.trainer.lr_scheduler_configs
        foreign = [config.scheduler for config in configs] != ([] if self._scheduler is None else [self._scheduler])
        if epoch not in self._starts or self._optimizer is None or foreign:
            return
        index = self._starts.index(epoch)
        for group in self._optimizer.param_groups:
            if group.get("name") in (*PARTS, OTHER):
                group["lr"] = self._lr_of(group["name"], self.phases[index])
            group["initial_lr"] = group["lr"]
        if self.scheduler_spec is not None:
            made = make_scheduler(self.scheduler_spec, self._optimizer, self._phase_steps(index))
            self._scheduler, configs[0].interval = made
            configs[0].scheduler = self._scheduler

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

    def teardown(self, stage: str) -> None:
        """Leave the last phase."""
        self._leave_phase()

    # ---------------------------------------------------------------- statistics of training predictions

    def keep_statistics(self, output: ConceptOutput) -> None:
        """Keep the predictions of a training step if the bottleneck trains and fits statistics on them."""
        if (size := self.bottleneck.statistics_size) > 0 and "bottleneck" in self.phase.train:
            self._recent.append((output.logits.detach(), output.probs.detach()))
            if len(self._recent) > max(size // max(len(output.logits), 1), 1):
                self._recent.popleft()

    def on_validation_epoch_start(self) -> None:
        """Fit what waits for the epoch's last batch before it is used, and before checkpoints are written."""
        self._fit_statistics()
        self._fit_head()

    def on_train_epoch_end(self) -> None:
        """Fit the statistics where there was no validation, or where it ran on averaged weights.

        Learning rates restart here already, so that callbacks see those of the next phase when its epoch starts.
        """
        self._fit_statistics()
        self._fit_head()
        self._restart_rates(self.current_epoch + 1)

    def _fit_statistics(self) -> None:
        if not self._recent or self.trainer.sanity_checking:
            return
        stacked = [torch.cat(column) for column in zip(*self._recent, strict=True)]
        if self.trainer.world_size > 1:
            stacked = [torch.cat(gather_all_tensors(column)) for column in stacked]
        self.bottleneck.fit_statistics(*stacked)

    def _fit_head(self) -> None:
        """Fit the head if the phase has a solver and the epoch is complete."""
        if (
            self._solver is None
            or self.trainer.sanity_checking
            or not self.trainer.fit_loop.epoch_loop._is_training_done
        ):
            return
        solver, self._solver = self._solver, None
        with torch.inference_mode(False), torch.enable_grad():
            solver.fit(self.device, self.trainer.world_size)
            renew_masks(self, [name for name in self._masked if name.startswith("head.")])
