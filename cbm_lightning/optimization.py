"""Optimizers and schedulers from names and numbers."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

ClassSpec = str | dict[str, Any]
"""A class of torch by its short name, any class by its path, or ``{"class_path": ..., "init_args": {...}}``."""


def resolve(spec: ClassSpec, namespace: Any, base: type, what: str) -> tuple[type, dict[str, Any]]:
    """The class and arguments that a specification names.

    Args:
        spec: See `ClassSpec`.
        namespace: Where short names are looked up, ``torch.optim`` or ``torch.optim.lr_scheduler``.
        base: What the class must derive from.
        what: Name of the field, for messages.

    Raises:
        ValueError: There is no such class, it is of another kind, or it does not take one of the arguments.
    """
    if isinstance(spec, dict) and (extra := set(spec) - {"class_path", "init_args"}):
        raise ValueError(f"{what}: expected the keys class_path and init_args, got also {sorted(extra)}")
    path, init_args = (spec, {}) if isinstance(spec, str) else (spec.get("class_path", ""), spec.get("init_args") or {})
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else namespace
    except ImportError as error:
        raise ValueError(f"{what}: cannot import {path!r}: {error}") from error
    known = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    # a package may import a class no earlier than it is asked for
    lazy = getattr(module, name, None) if module_name else None
    known |= {name: lazy} if isinstance(lazy, type) and issubclass(lazy, base) else {}
    cls = known.get(name) or next((c for n, c in known.items() if n.lower() == name.lower()), None)
    if cls is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(f"{what}: no {base.__name__} is called {path!r}; near matches are {near or sorted(known)}")
    accepted = inspect.signature(cls).parameters
    if unknown := [key for key in init_args if key not in accepted]:
        raise ValueError(f"{what}: {cls.__name__} takes {list(accepted)[1:]}, not {unknown}")
    return cls, dict(init_args)


def check_optimizer(spec: ClassSpec, lr: float, weight_decay: float) -> None:
    """Check a specification by making the optimizer for a stand-in.

    Raises:
        ValueError: See `resolve`; or a value is out of range, or there is no weight decay and one was asked for.
    """
    cls, _ = resolve(spec, torch.optim, Optimizer, "optimizer")
    if weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        raise ValueError(f"weight_decay: {cls.__name__} has none, got {weight_decay}")
    # a matrix, which is all that some optimizers take
    make_optimizer(spec, [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}], lr, weight_decay)


def make_optimizer(spec: ClassSpec, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> Optimizer:
    """An optimizer over parameter groups; ``init_args`` of the specification win over the plain numbers."""
    cls, init_args = resolve(spec, torch.optim, Optimizer, "optimizer")
    numbers = {"lr": lr, "weight_decay": weight_decay}
    accepted = inspect.signature(cls).parameters
    optimizer: Optimizer = cls(groups, **{name: n for name, n in numbers.items() if name in accepted} | init_args)
    return optimizer


def check_scheduler(spec: ClassSpec | None, monitor: str | None) -> None:
    """Check a specification without making a scheduler.

    Raises:
        ValueError: See `resolve`; or the scheduler follows a value and none is monitored.
    """
    if spec is None:
        return
    cls, _ = resolve(spec, lr_scheduler, LRScheduler, "lr_scheduler")
    if issubclass(cls, ReduceLROnPlateau) and not monitor:
        raise ValueError(f"monitor: {cls.__name__} follows a logged value, such as 'val/concept_acc'; got none")


def make_scheduler(spec: ClassSpec, optimizer: Optimizer, steps: int | None) -> tuple[LRScheduler, str]:
    """A scheduler over one phase, and whether it advances each ``"step"`` or each ``"epoch"``.

    A length that the scheduler needs and the user left out (``total_steps`` of OneCycleLR, ``T_max`` of
    CosineAnnealingLR, ``total_iters`` of PolynomialLR and others) becomes that of the phase, and ``max_lr`` the
    learning rate of each group. Such schedulers, and those that are defined in steps, advance each step; all others
    each epoch.

    Args:
        spec: See `ClassSpec`.
        optimizer: With the learning rates of the phase.
        steps: Optimizer steps of the phase; None if it has no end.

    Raises:
        ValueError: A length must be filled in, but the phase has no end.
    """
    cls, init_args = resolve(spec, lr_scheduler, LRScheduler, "lr_scheduler")
    accepted = inspect.signature(cls).parameters
    length = next((key for key in ("total_steps", "T_max", "total_iters") if key in accepted), None)
    interval = "step" if issubclass(cls, (OneCycleLR, CyclicLR)) else "epoch"
    if length is not None and length not in init_args and "epochs" not in init_args:
        if steps is None:
            raise ValueError(
                f"lr_scheduler: {cls.__name__} needs {length}, and the phase has no end to take it from; give "
                "init_args, or the Trainer max_epochs or max_steps"
            )
        init_args[length] = steps
        interval = "step"
    if "max_lr" in accepted and "max_lr" not in init_args:
        init_args["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    return cls(optimizer, **init_args), interval


def check_positive(**numbers: float) -> None:
    """Raise ValueError for a number that is not positive and finite."""
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name}: expected a positive number, got {number}")


def check_weights(name: str, weights: Mapping[str, float] | None) -> dict[str, float]:
    """A copy of named weights.

    Raises:
        ValueError: A weight is negative or not finite.
    """
    checked = dict(weights or {})
    for key, value in checked.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected numbers of at least 0, got {key}: {value}")
    return checked
