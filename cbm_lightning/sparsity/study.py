"""How well sparse heads do at a number of effective concepts, beside heads on random concepts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cbm_lightning.labels import Task
from cbm_lightning.sparsity.accuracy import HeadAccuracy
from cbm_lightning.sparsity.design import ConstantConceptWarning
from cbm_lightning.sparsity.nec import Sparsity, clip_levels
from cbm_lightning.sparsity.outputs import fill_rows
from cbm_lightning.sparsity.solution import SparseSolution

if TYPE_CHECKING:
    import pandas as pd

    from cbm_lightning.sparsity.elastic_net_path import ElasticNetPath

LEVELS = (5, 10, 15, 20, 25, 30)
"""Numbers of effective concepts of VLG-CBM's protocol."""


@dataclass(frozen=True)
class Scores:
    """What heads are fitted and judged on.

    Attributes:
        values: ``[n, V]`` what the label head reads.
        pooled: ``[n, D]`` features of the backbone, of which random concepts are made.
        label: ``[n]``, or ``[n, L]`` for several labels.
    """

    values: Tensor
    pooled: Tensor
    label: Tensor


@dataclass(frozen=True)
class NECCurve:
    """Accuracy over the number of effective concepts.

    Attributes:
        nec: What each head really has; below the level where the classes need no more.
        accuracy: Label accuracy in [0, 1].
    """

    nec: list[float]
    accuracy: list[float]

    @property
    def anec(self) -> float:
        """Mean accuracy over the levels."""
        return sum(self.accuracy) / len(self.accuracy)


@dataclass(frozen=True)
class NECResult:
    """What `NECStudy` found.

    Attributes:
        levels: Numbers of effective concepts, none above the number of concepts.
        curves: By kind of head: ``path`` (elastic net), ``pruned`` (the model's own head), ``random`` (elastic net on
            random concepts), each also with the kept weights fitted anew (``path_refit``, ...).
        own: Sparsity of the model's own head, None if it has no weights a concept.
        samples: Number of samples judged.
        kept: ``[L, K, m]`` weights on standardised scores at the lowest level, of ``path``; zero for a class without a
            training sample.
    """

    levels: list[float]
    curves: dict[str, NECCurve]
    own: Sparsity | None
    samples: int
    kept: Tensor

    def scalars(self) -> dict[str, float]:
        """The numbers worth logging, by name: ``nec``, ``path/anec``, ``path/acc_at_nec5``, ..."""
        found = {} if self.own is None else self.own.scalars()
        for name, curve in self.curves.items():
            found[f"{name}/anec"] = curve.anec
            found |= {f"{name}/acc_at_nec{x:g}": y for x, y in zip(self.levels, curve.accuracy, strict=True)}
        return found

    def table(self) -> pd.DataFrame:
        """A row a kind of head and level: ``head``, ``level``, ``nec`` (what it really has), ``accuracy``."""
        import pandas as pd

        rows = [
            {"head": name, "level": level, "nec": nec, "accuracy": accuracy}
            for name, curve in self.curves.items()
            for level, nec, accuracy in zip(self.levels, curve.nec, curve.accuracy, strict=True)
        ]
        return pd.DataFrame(rows, columns=["head", "level", "nec", "accuracy"])


class NECStudy:
    """Fits heads of a few concepts on training scores, and judges them on others (VLG-CBM, Srivastava et al. 2024).

    Args:
        num_concepts: ``K``.
        group_size: Numbers of a concept; the scores have ``K * group_size`` columns.
        num_outputs: Logits of a head.
        task: What they mean.
        levels: Numbers of effective concepts; those above ``K`` become ``K``.
        solver: Options of `ElasticNetPath`.
        refit_ridge: Ridge with which kept weights are fitted anew; None leaves this out.
        random_concepts: Fit heads on as many random directions of the features too: what concepts with a meaning must
            be better than.
        seed: Of the random directions.
        names: Of the columns, for messages.

    Raises:
        ValueError: There is no level, or one is not positive.
    """

    def __init__(
        self,
        num_concepts: int,
        num_outputs: int,
        task: Task = "multiclass",
        levels: Sequence[float] = LEVELS,
        group_size: int = 1,
        solver: Mapping[str, Any] | None = None,
        refit_ridge: float | None = 1e-3,
        random_concepts: bool = True,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.levels = clip_levels(levels, num_concepts)
        self.num_concepts, self.group_size, self.num_outputs, self.task = num_concepts, group_size, num_outputs, task
        self.solver, self.refit_ridge, self.random_concepts, self.seed = (
            dict(solver or {}),
            refit_ridge,
            random_concepts,
            seed,
        )
        self.names = names
        self._solutions: dict[str, list[SparseSolution]] = {}
        self._metrics: dict[str, HeadAccuracy] = {}
        self._directions: Tensor | None = None
        self._kept = torch.zeros(num_outputs, num_concepts, group_size)
        self.own: Sparsity | None = None

    def check(self) -> None:
        """Check the options of the solver.

        Raises:
            ValueError: One is unknown or out of range.
        """
        try:
            self._path(self.group_size).check_problem(self.num_concepts, self.task == "multilabel")
        except TypeError as error:
            raise ValueError(f"solver: {error}") from None

    def copy(self) -> NECStudy:
        """A study of the same heads that has judged nothing yet."""
        made = copy(self)
        made._metrics = {name: deepcopy(metric) for name, metric in self._metrics.items()}
        for metric in made._metrics.values():
            metric.reset()
        return made

    def fit(self, train: Scores, own: tuple[Tensor, Tensor] | None = None) -> None:
        """Fit a head for each kind and level.

        Args:
            train: Training samples, of this process where the solver's ``distributed`` is set.
            own: Weights ``[L, V]`` and biases ``[L]`` of the model's own head, to be pruned.
        """
        path = self._path(self.group_size)
        self._fit("path", path, train.values, train)
        if own is not None:
            weight, bias = (part.detach().to(train.values) for part in own)
            self.own = Sparsity.of(weight.unflatten(1, (-1, self.group_size)))
            self._fit("pruned", path, train.values, train, standardized(weight, bias, path.solution_))
        if self.random_concepts:
            generator = torch.Generator().manual_seed(self.seed)
            directions = torch.randn(train.pooled.shape[1], self.num_concepts, generator=generator)
            self._directions = directions.to(train.pooled)
            self._fit("random", self._path(1), train.pooled @ self._directions, train)

    def add(self, scores: Scores) -> None:
        """Judge the heads on further samples."""
        for name, metric in self._metrics.items():
            values = scores.values
            if name.startswith("random") and self._directions is not None:
                values = scores.pooled.to(self._directions) @ self._directions
            metric.update(values, scores.label)

    def finish(self) -> NECResult:
        """The curves, over all processes."""
        with torch.inference_mode(False):
            found = {name: metric.compute().reshape(-1).tolist() for name, metric in self._metrics.items()}
            samples = 0
            for metric in self._metrics.values():
                samples = int(metric.total)
                metric.reset()
        necs = {name: [solution.nec for solution in solutions] for name, solutions in self._solutions.items()}
        curves = {name: NECCurve(necs[name], accuracy) for name, accuracy in found.items()}
        return NECResult(self.levels, curves, self.own, samples, self._kept)

    def _path(self, group_size: int) -> ElasticNetPath:
        from cbm_lightning.sparsity.elastic_net_path import ElasticNetPath

        family = "multinomial" if self.task == "multiclass" else "ovr"
        options = {"family": family, **self.solver, "nec": self.levels, "group_size": group_size}
        return ElasticNetPath(**options)

    def _fit(
        self, name: str, path: ElasticNetPath, x: Tensor, train: Scores, dense: SparseSolution | None = None
    ) -> None:
        """Heads of one kind: of the path, or of a dense head that is pruned."""
        label = train.label if self.task == "multilabel" else train.label.view(-1).long()
        if dense is None:
            with warnings.catch_warnings():
                # the curve says what each level really has
                warnings.filterwarnings("ignore", message="nec: the smallest penalty")
                path.fit(x, label, self.names if x is train.values else None)
        solutions = [path.at_nec(level) if dense is None else dense.pruned(level) for level in self.levels]
        self._keep(name, solutions, path, x)
        if name == "path":
            classes, first = torch.as_tensor(path.classes_), solutions[0]
            shown, _ = fill_rows(first.weight, first.bias, classes.long(), self.num_outputs, x)
            self._kept = shown.unflatten(1, (-1, self.group_size))
        if self.refit_ridge is not None:
            rows = [as_fitted(s, torch.as_tensor(path.classes_), len(path.solution_.bias)) for s in solutions]
            names = self.names if x is train.values else None
            with warnings.catch_warnings():
                # said when the path was fitted
                warnings.simplefilter("ignore", ConstantConceptWarning)
                again = [path.refit(s, x, label, self.refit_ridge, names) for s in rows]
            self._keep(f"{name}_refit", again, path, x)

    def _keep(self, name: str, solutions: list[SparseSolution], path: ElasticNetPath, x: Tensor) -> None:
        classes = torch.as_tensor(path.classes_).long()
        rows = [
            (s.coef, s.intercept)
            if len(s.bias) == self.num_outputs
            else fill_rows(s.coef, s.intercept, classes, self.num_outputs, x, path.distributed)
            for s in solutions
        ]
        weight, bias = (torch.stack(column).to(x) for column in zip(*rows, strict=True))
        self._solutions[name] = solutions
        self._metrics[name] = HeadAccuracy(weight, bias, self.task).to(x.device)


def as_fitted(solution: SparseSolution, classes: Tensor, rows: int) -> SparseSolution:
    """A head with the rows that a classifier fitted to the same samples has: the inverse of `fill_rows`.

    Args:
        solution: Has a row a logit.
        classes: The classes that the samples have.
        rows: Of the classifier.
    """
    weight, bias = solution.weight, solution.bias
    if len(bias) == rows:
        return solution
    if len(bias) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    else:
        chosen = classes.long().to(bias.device)
        weight, bias = weight[chosen], bias[chosen]
        if rows == 1:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return replace(solution, weight=weight, bias=bias)


def standardized(weight: Tensor, bias: Tensor, like: SparseSolution) -> SparseSolution:
    """A dense head for standardised scores, so that the sizes of its weights compare.

    Args:
        weight: ``[L, V]`` for scores as they come.
        bias: ``[L]``.
        like: Has the mean and scale of the scores.
    """
    scale = like.scale.to(weight)
    return SparseSolution(
        weight=torch.where(scale.isinf(), 0.0, weight * scale.where(scale.isfinite(), 0.0)),
        bias=bias + weight @ like.mean.to(weight),
        mean=like.mean.to(weight),
        scale=scale,
        lam=0.0,
        objective=float("nan"),
        kkt=float("nan"),
        iterations=0,
        group_size=like.group_size,
    )
