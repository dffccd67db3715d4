"""Training in phases: what trains, what the head reads, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from cbm_lightning.head_solver import solver_spec

HeadInput = Literal["predicted", "true", "detached"]
PARTS = ("backbone", "bottleneck", "head")


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which some parts train and the others stand still, BatchNorm statistics included.

    Args:
        name: For messages and logs.
        train: The parts that train: of ``backbone``, ``bottleneck`` and ``head``.
        epochs: How many; None shares what the other phases leave of ``max_epochs``.
        head_input: In training the head reads predicted concepts, annotated ones (``"true"``, independent training),
            or predicted ones without passing the label's gradient on (``"detached"``). Evaluation reads predictions.
        loss_weights: Replaces the module's weights of the losses named. A loss of weight 0 is neither computed into
            the total nor logged, and label metrics are not logged while the weight of ``label`` is 0.
        lr: Learning rate of this phase; None takes the module's.
        solver: Fits the head instead of gradients: an estimator in scikit-learn's conventions (`ElasticNetPath`,
            ``sklearn.linear_model.LogisticRegression``), or ``{"class_path": ..., "init_args": ...}``. Such a phase
            trains the head alone and takes one epoch, which is one pass over the training data; RandInt is off.

    Raises:
        ValueError: A part, a head input or a number is not one of those above, or does not go with a solver.

    Example:
        >>> Phase("labels", train=["head"], head_input="true", epochs=10).epochs
        10
    """

    name: str
    train: Sequence[str] = PARTS
    epochs: int | None = None
    head_input: HeadInput = "predicted"
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    lr: float | None = None
    solver: Any = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            self._check_solver(self.solver)
        if not self.train or set(self.train) - set(PARTS):
            raise ValueError(f"phase {self.name!r}: train: expected some of {PARTS}, got {list(self.train)}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"phase {self.name!r}: epochs: expected at least 1, got {self.epochs}")
        if self.head_input not in get_args(HeadInput):
            raise ValueError(
                f"phase {self.name!r}: head_input: expected {get_args(HeadInput)}, got {self.head_input!r}"
            )
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"phase {self.name!r}: lr: expected a positive number, got {self.lr}")

    def _check_solver(self, solver: Any) -> None:
        wrong = {"lr": self.lr, "epochs": None if self.epochs == 1 else self.epochs}
        if given := {name: value for name, value in wrong.items() if value is not None}:
            raise ValueError(f"phase {self.name!r}: a solver takes one epoch and no learning rate, got {given}")
        if list(self.train) != ["head"]:
            raise ValueError(f"phase {self.name!r}: train: a solver fits ['head'], got {list(self.train)}")
        object.__setattr__(self, "solver", solver_spec(solver))
        object.__setattr__(self, "epochs", 1)

    def weights(self, given: Mapping[str, float]) -> dict[str, float]:
        """The module's weights of losses, with those that this phase replaces."""
        return {**given, **self.loss_weights}

    def losses_off(self, given: Mapping[str, float]) -> set[str]:
        """The losses that do not count in this phase, under the module's weights."""
        return {name for name, weight in self.weights(given).items() if weight == 0}

    def to_dict(self) -> dict[str, Any]:
        """Plain form, for checkpoints."""
        written = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**written, "train": list(self.train), "loss_weights": dict(self.loss_weights)}

    @classmethod
    def make(cls, source: Phase | Mapping[str, Any]) -> Phase:
        """From a phase or its plain form."""
        return source if isinstance(source, Phase) else cls(**source)


def joint() -> list[Phase]:
    """Everything together (Koh et al. 2020, joint)."""
    return [Phase("joint")]


def sequential() -> list[Phase]:
    """Concepts first, then the head on the predicted concepts of the frozen rest (Koh et al. 2020, sequential)."""
    return [
        Phase("concepts", train=("backbone", "bottleneck"), loss_weights={"label": 0.0}),
        Phase("labels", train=("head",), loss_weights={"concept": 0.0}),
    ]


def independent() -> list[Phase]:
    """Concepts first, then the head on the annotated concepts (Koh et al. 2020, independent)."""
    concepts, labels = sequential()
    return [concepts, Phase("labels", train=labels.train, head_input="true", loss_weights=labels.loss_weights)]


PRESETS = {"joint": joint, "sequential": sequential, "independent": independent}


def make_phases(source: str | Sequence[Phase | Mapping[str, Any]]) -> list[Phase]:
    """Phases from a preset's name or a list.

    Raises:
        ValueError: The name is unknown, the list is empty, or two phases share a name.
    """
    if isinstance(source, str):
        if source not in PRESETS:
            raise ValueError(f"phases: expected one of {sorted(PRESETS)} or a list of phases, got {source!r}")
        return PRESETS[source]()
    phases = [Phase.make(phase) for phase in source]
    names = [phase.name for phase in phases]
    if not phases or len(set(names)) < len(names):
        raise ValueError(f"phases: expected one or more phases with names of their own, got {names}")
    return phases


def phase_starts(phases: Sequence[Phase], max_epochs: int | None) -> list[int]:
    """First epoch of each phase.

    Args:
        phases: In order.
        max_epochs: The Trainer's; None or -1 for no limit, which only the last phase can make use of.

    Raises:
        ValueError: The epochs of the phases do not add up to ``max_epochs``; the message says both numbers.
    """
    fixed = sum(phase.epochs or 0 for phase in phases)
    open_phases = [phase.name for phase in phases if phase.epochs is None]
    if max_epochs is None or max_epochs < 0:
        if any(phase.epochs is None for phase in phases[:-1]):
            raise ValueError(
                f"phases {open_phases} have no epochs and the Trainer has no max_epochs to share; set either"
            )
        left = 0
    else:
        left = max_epochs - fixed
        if left < len(open_phases) or (left and not open_phases):
            need = f"{fixed} epochs" + (f" and at least 1 each for {open_phases}" if open_phases else "")
            raise ValueError(
                f"the phases take {need}, but the Trainer's max_epochs is {max_epochs}; change one of them"
            )
    share, extra = divmod(left, max(len(open_phases), 1))
    starts, epoch, given = [], 0, 0
    for phase in phases:
        starts.append(epoch)
        if phase.epochs is None:
            # what does not divide evenly goes to the earlier phases
            epoch += share + (given < extra)
            given += 1
        else:
            epoch += phase.epochs
    return starts
