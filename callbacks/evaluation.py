"""What callbacks share that look at predictions in validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

Stage = Literal["val", "test"]


class EvaluationCallback(Callback):
    """Turns the hooks of validation and test into three: `begin`, `take` and `finish`, told the stage.

    In a fit `due` says which validations count; in the check before training (sanity checking) batches are taken, so
    that what fails fails early, but nothing is finished.

    Args:
        every_n_epochs: Validations of a fit count in every n-th epoch.

    Raises:
        ValueError: ``every_n_epochs`` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: expected at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """An evaluation begins; what an interrupted one left is to be forgotten."""

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """A batch was evaluated, with the ``outputs`` of the module's step."""

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """The evaluation ends; the place for ``log``."""

    def due(self, trainer: Trainer) -> bool:
        """Whether this validation counts."""
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.begin(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.begin(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch that counts."""
        if trainer.sanity_checking or self.due(trainer):
            self.take(trainer, pl_module, "val", outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch."""
        self.take(trainer, pl_module, "test", outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish, except before training."""
        if not trainer.sanity_checking:
            self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.finish(trainer, pl_module, "test")


class NamedEvaluation(EvaluationCallback):
    """An evaluation of label predictions that logs under a name, so that several can work in one Trainer.

    Args:
        stages: Where to run: ``"val"``, ``"test"`` or both.
        name: Stands in the log keys.
        every_n_epochs: See `EvaluationCallback`.

    Raises:
        ValueError: A stage is unknown, or ``every_n_epochs`` is below 1.
    """

    def __init__(self, stages: Sequence[Stage], name: str, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        if not stages or set(stages) - {"val", "test"}:
            raise ValueError(f"stages: expected 'val', 'test' or both, got {list(stages)}")
        self.stages, self.name = tuple(stages), name

    def refuse_namesakes(self, trainer: Trainer) -> None:
        """Check that no other evaluation of this kind logs under the same name.

        Raises:
            ValueError: One does.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, type(self)) and c is not self]
        if any(c.name == self.name and set(c.stages) & set(self.stages) for c in others):
            raise ValueError(
                f"name: two evaluations of one Trainer would log under {self.name!r}; give each a name of its own, "
                f"such as '{self.name}_2'"
            )

    def wanted(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> bool:
        """Whether this evaluation counts: its stage and turn, and not in a phase in which only concepts train."""
        labelled = bool(getattr(pl_module, "label_matters", True))
        return stage in self.stages and self.due(trainer) and labelled and not trainer.sanity_checking
