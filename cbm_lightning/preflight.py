"""What cannot work in a run of several phases is refused before it trains anything."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy

from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.heads import LabelHead
from cbm_lightning.phases import PARTS, Phase


def check_trains(phases: Sequence[Phase], parametric: set[str]) -> None:
    """Check that every phase has something to train.

    Args:
        phases: In order.
        parametric: The parts with parameters.

    Raises:
        ValueError: No part that a phase trains has any parameter (texts and other training-free parts have none).
    """
    for phase in phases:
        if not parametric & set(phase.train):
            raise ValueError(
                f"phase {phase.name!r}: train: {list(phase.train)} of this model have no parameters; train something "
                f"else ({sorted(parametric) or 'nothing here can be trained: test or predict instead'})"
            )


def check_strategy(strategy: Any, phases: Sequence[Phase], weights: Mapping[str, float], trainable: set[str]) -> None:
    """Check that data parallel training can follow the phases.

    Args:
        strategy: The Trainer's.
        phases: In order.
        weights: The module's weights of losses.
        trainable: The parts with parameters that are not frozen for good.

    Raises:
        ValueError: Plain DDP, which needs a gradient of every parameter in every step, and a phase that does not train
            everything.
    """
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters", False):
        return
    for phase in phases:
        if phase.solver:
            continue  # no gradients at all
        unused = set(PARTS) - set(phase.train) | ({"head"} if "label" in phase.losses_off(weights) else set())
        if idle := sorted(unused & trainable):
            raise ValueError(
                f"phase {phase.name!r} leaves the parameters of {idle} unused, which plain DDP cannot follow; set the "
                "Trainer's strategy to 'ddp_find_unused_parameters_true'"
            )


def check_monitors(
    trainer: Trainer, phases: Sequence[Phase], weights: Mapping[str, float], scheduler_monitor: str | None
) -> None:
    """Check that every monitored value exists, and means the same, in all phases.

    Raises:
        ValueError: A phase does not log it, a callback compares total losses that differ in their terms, or the best
            checkpoint may lack what a solver fits.
    """
    solving = [phase.name for phase in phases if phase.solver]
    keepers = [c for c in _watchers(trainer) if isinstance(c, ModelCheckpoint) and c.monitor]
    if solving and len(phases) > 1 and keepers:
        raise ValueError(
            f"{type(keepers[0]).__name__} monitors {keepers[0].monitor!r}, so the checkpoint that it calls best may be "
            f"from before the solver of phase {solving[0]!r}; monitor nothing and keep the last checkpoint"
        )
    watched = [(type(c).__name__, getattr(c, "monitor", None)) for c in _watchers(trainer)]
    for owner, monitor in [*watched, ("lr_scheduler", scheduler_monitor)]:
        _, _, name = (monitor or "").partition("/")
        for phase in phases:
            off = phase.losses_off(weights)
            unlogged = {f"loss_{loss}" for loss in off} | ({"label_acc"} if "label" in off else set())
            # a scheduler starts anew in each phase, so its loss may be another one
            differs = name == "loss" and owner != "lr_scheduler" and phase.loss_weights != phases[0].loss_weights
            if name in unlogged or differs:
                why = "means another sum in each phase" if differs else f"is not logged in phase {phase.name!r}"
                raise ValueError(
                    f"{owner} monitors {monitor!r}, which {why}; monitor something that all phases log, or nothing and "
                    "keep the last checkpoint"
                )


def check_stopping(trainer: Trainer, phases: Sequence[Phase], starts: Sequence[int]) -> None:
    """Check that no callback ends the run before the last phase begins.

    Raises:
        ValueError: There are several phases, and EarlyStopping may stop in an earlier one.
    """
    stopping = [c for c in _watchers(trainer) if isinstance(c, EarlyStopping)]
    if len(phases) > 1 and stopping and (trainer.min_epochs or 0) <= starts[-1]:
        raise ValueError(
            f"{type(stopping[0]).__name__} may end the run before phase {phases[-1].name!r} begins; give the phases "
            f"their epochs and drop it, or set the Trainer's min_epochs above {starts[-1]}"
        )


def check_head(bottleneck: Bottleneck, head: LabelHead) -> None:
    """Check that exactly one of bottleneck and head predicts the label.

    Raises:
        ValueError: Both do, or neither.
    """
    if bottleneck.owns_label == head.reads_values:
        who = "predicts the label itself" if bottleneck.owns_label else "leaves the label to the head"
        mend = "PassThroughHead, or name no head" if bottleneck.owns_label else "LinearHead"
        raise ValueError(
            f"head: {type(bottleneck).__name__} {who}, which does not go with {type(head).__name__}; use {mend}"
        )


def check_discovery(bottleneck: Bottleneck, concepts: object) -> None:
    """Check that a bottleneck that finds concepts is told how many, rather than taking the data's names for them.

    Raises:
        ValueError: Nobody said.
    """
    if bottleneck.discovers and concepts is None:
        raise ValueError(
            f"concepts: {type(bottleneck).__name__} discovers concepts of its own, which are not those of the data; "
            "say how many, concepts=20 (model.concepts: 20)"
        )


def check_label_reaches(phases: Sequence[Phase], weights: Mapping[str, float], needs_label: bool) -> None:
    """Check that a bottleneck that learns from the label's gradient gets it wherever it trains.

    Raises:
        ValueError: A phase trains it without.
    """
    for phase in phases if needs_label else ():
        label = "label" not in phase.losses_off(weights) and phase.head_input == "predicted"
        if "bottleneck" in phase.train and not label:
            raise ValueError(
                f"phase {phase.name!r} trains the bottleneck without the label's gradient, which tells it what the "
                "label needs (gates would all close, discovered concepts would mean nothing); train jointly, or leave "
                "that option out"
            )


def check_averaging(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Check that what a solver fits is not averaged with what it replaces.

    Raises:
        ValueError: A phase has a solver, and a callback averages weights.
    """
    solving = [phase.name for phase in phases if phase.solver]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    if solving and averaging:
        raise ValueError(
            f"phase {solving[0]!r} fits the head to the latest weights, which {type(averaging[0]).__name__} would "
            "replace by averages; drop the callback, or fit the head in a second run on what was averaged"
        )


def _watchers(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, (Checkpoint, EarlyStopping))]


def check_loss_names(phase: Phase, given: Mapping[str, float], weights: Mapping[str, float], training: bool) -> None:
    """Check that the weights of losses name losses that exist, and that one of them counts.

    Args:
        phase: The current phase.
        given: ``loss_weights`` of the module.
        weights: Factor of each loss that was computed.
        training: Whether all losses were; some exist in training steps alone.

    Raises:
        ValueError: A weight names no loss, or nothing is left to train on.
    """
    named = phase.weights(given).keys()
    if training and (unknown := sorted(named - weights.keys() - {"label", "concept"})):
        near = difflib.get_close_matches(unknown[0], [*weights, "label", "concept"], n=2)
        raise ValueError(
            f"loss_weights: no loss is called {unknown}, there are {sorted(weights)}; did you mean {near}?"
        )
    if not any(weights.values()):
        raise ValueError(f"phase {phase.name!r}: no loss counts, the weights are {dict(weights)}; nothing would train")
