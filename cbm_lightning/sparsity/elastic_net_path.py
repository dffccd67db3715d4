"""Sparse heads along a path of penalties, or at a wanted number of effective concepts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from cbm_lightning.sparsity.design import Design, as_tensor
from cbm_lightning.sparsity.families import FamilyName, make_family
from cbm_lightning.sparsity.labels import EncodedLabels, encode_labels
from cbm_lightning.sparsity.penalties import KeptRidge, Penalty, PenaltyName, make_penalty
from cbm_lightning.sparsity.problem import Point, Problem
from cbm_lightning.sparsity.search import find_levels
from cbm_lightning.sparsity.solution import SparseSolution
from cbm_lightning.sparsity.solver import solve, tolerance

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class ElasticNetPath(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Sparse linear classifier on concept scores, exact, for a path of penalties (GLM-SAGA, Wong et al. 2021).

    Minimises ``mean loss + lambda * (alpha * |W|_1 + (1 - alpha) / 2 * |W|_2^2)`` on standardised scores; biases are
    free. Where GLM-SAGA takes stochastic steps and stops short of the optimum, this solver takes full-batch steps
    until the optimality conditions hold to ``tol``, see `solver.solve`; the same data gives the same weights. An
    estimator in scikit-learn's conventions, on arrays and on tensors.

    Three ways to say how sparse: penalties (``lambdas``), numbers of effective concepts (``nec``, VLG-CBM, Srivastava
    et al. 2024), or neither, for ``n_lambdas`` penalties from the one that allows no weight down to ``eps`` times it.

    Args:
        lambdas: A penalty, or several.
        nec: A number of effective concepts, or several. The penalty is searched until the solution has as many, up to
            2 % more (or the next number, where it jumps); the smallest weights of these go.
        n_lambdas: Length of the path where neither is given.
        eps: Smallest penalty of the path, and of the search, as a share of the largest.
        max_nec: The path ends with the first solution of more effective concepts.
        alpha: Share of the l1 norm; the rest is a ridge.
        penalty: ``"l1"``, or ``"group"``, which drops a concept for all classes at once, by penalty and by pruning.
        family: ``"multinomial"`` (softmax) or ``"ovr"`` (a logistic loss a class; also for several labels a sample).
        standardize: Divide scores by their standard deviation. Without it weights, and what of them is kept, depend on
            the units of the scores.
        fit_intercept: Fit a bias a class.
        refit_ridge: Fit the kept weights anew with this ridge instead of the penalty, which undoes its shrinkage; None
            leaves them.
        group_size: Consecutive columns that belong to one concept (concept embeddings).
        tol: Largest violation of the optimality conditions (KKT), in units of the gradient; for a penalty below 100
            times as much, 1 % of the penalty.
        max_iter: Steps of the solver at most, for each penalty.
        dtype: ``"float32"`` or ``"float64"``, of all computation.
        chunk_size: Rows that are in memory at a time; see `Design`. Memory is then, in numbers of ``dtype``, below
            ``4 n L + 3 chunk_size (K + 3 L) + 4 K^2 + 20 K L + 2^24``.
        device: Where to compute; that of ``X`` by default.
        distributed: Every process of the default group brings samples of its own; all get the same solution.

    Attributes:
        path_: A `SparseSolution` for each penalty that was tried, largest first.
        coef_: ``[L, K]`` weights of the scores as they came, of the last solution (one row for two classes and
            ``"ovr"``).
        intercept_: ``[L]``.
        solution_: The same as `SparseSolution`.
        classes_: Labels in the order of the rows.
        lambda_max_: The penalty that allows no weight.
        n_features_in_: ``K``.

    Raises:
        ValueError: An argument is out of range, or two contradict each other.

    Example:
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> sparse = ElasticNetPath(nec=1).fit(x, (x[:, 2] > 0).long())
        >>> sparse.coef_.any(0).tolist()
        [False, False, True, False, False, False]
    """

    def __init__(
        self,
        lambdas: float | Sequence[float] | None = None,
        nec: float | Sequence[float] | None = None,
        n_lambdas: int = 50,
        eps: float = 1e-3,
        max_nec: float | None = None,
        alpha: float = 0.99,
        penalty: PenaltyName = "l1",
        family: FamilyName = "multinomial",
        standardize: bool = True,
        fit_intercept: bool = True,
        refit_ridge: float | None = None,
        group_size: int = 1,
        tol: float = 1e-5,
        max_iter: int = 1000,
        dtype: str = "float32",
        chunk_size: int | None = None,
        device: str | None = None,
        distributed: bool = False,
    ) -> None:
        self.lambdas = lambdas
        self.nec = nec
        self.n_lambdas = n_lambdas
        self.eps = eps
        self.max_nec = max_nec
        self.alpha = alpha
        self.penalty = penalty
        self.family = family
        self.standardize = standardize
        self.fit_intercept = fit_intercept
        self.refit_ridge = refit_ridge
        self.group_size = group_size
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.chunk_size = chunk_size
        self.device = device
        self.distributed = distributed
        self._check()

    def fit(self, X: Any, y: Any, names: Sequence[str] | None = None) -> Self:
        """Fit the path.

        Args:
            X: ``[n, K]`` scores: array, tensor, data frame or file-backed array.
            y: ``[n]`` labels of any kind, or ``[n, L]`` of 0 and 1 for several labels a sample.
            names: Names of the columns for messages; those of a data frame by default.

        Raises:
            ValueError: Scores are not finite (the message names the concepts), there is one class only, lengths
                differ, or ``nec`` is above the number of concepts.
        """
        self._check()
        problem, encoded = self._problem(X, y, names)
        concepts, levels = problem.design.columns // self.group_size, _as_list(self.nec)
        self.check_problem(concepts, encoded.multilabel)
        penalty, null = self._penalty(problem.design), problem.null()
        largest = penalty.null_strength(problem.gradient(problem.logits(null))[0])
        if largest == 0:
            # no score differs between the classes, which the warning of constant concepts has said
            path = [self._solve(problem, penalty, 0.0, null)[0]]
            chosen = path[0]
        elif self.nec is None:
            path = self._follow(problem, penalty, null, largest)
            chosen = path[-1]
        else:
            found = find_levels(
                lambda lam, start: self._solve(problem, penalty, lam, start), levels, largest, self.eps, null
            )
            path = sorted(found, key=lambda solution: -solution.lam)
            chosen = at_nec(path, levels[-1])
        if self.refit_ridge is not None:
            chosen = self._refit(problem, chosen, self.refit_ridge)
        # nothing of a fit that failed is kept
        self.path_, self.solution_, self.lambda_max_ = path, chosen, largest
        self.coef_, self.intercept_ = chosen.coef.cpu().numpy(), chosen.intercept.cpu().numpy()
        self.n_features_in_, self.classes_, self.multilabel_ = (
            problem.design.columns,
            encoded.classes,
            encoded.multilabel,
        )
        return self

    def check_problem(self, concepts: int, multilabel: bool) -> None:
        """Check the arguments against a problem before there is data.

        Args:
            concepts: Number of concepts.
            multilabel: Whether a sample may have several labels.

        Raises:
            ValueError: ``nec`` is above the number of concepts, or the family knows one label a sample only.
        """
        if self.nec is not None and _as_list(self.nec)[-1] > concepts:
            raise ValueError(f"nec: expected at most the {concepts} concepts of X, got {_as_list(self.nec)[-1]:g}")
        if multilabel and self.family != "ovr":
            raise ValueError(f"family: several labels a sample need family='ovr', got {self.family!r}")

    def at_nec(self, level: float, prune: bool = True) -> SparseSolution:
        """The solution of the path with so many effective concepts or few more, pruned to exactly as many.

        The densest solution where none has enough.

        Args:
            level: Mean number of concepts a class.
            prune: Keep the largest weights only, as many as asked for (VLG-CBM's protocol).
        """
        check_is_fitted(self)
        return at_nec(self.path_, level, prune)

    def refit(
        self, solution: SparseSolution, X: Any, y: Any, ridge: float = 1e-3, names: Sequence[str] | None = None
    ) -> SparseSolution:
        """Fit the weights that a solution keeps anew, with a ridge instead of the penalty.

        Args:
            solution: Its zeros stay.
            X: As in `fit`.
            y: As in `fit`, with the same classes.
            ridge: Strength of the ridge, above 0: without one, weights grow without end where classes are separable.
            names: As in `fit`.

        Raises:
            ValueError: Columns or classes are others than in `fit`, or the ridge is not positive.
        """
        check_is_fitted(self)
        if not ridge > 0:
            raise ValueError(f"ridge: expected a positive number, got {ridge}")
        problem, encoded = self._problem(X, y, names)
        self._check_columns(problem.design.x)
        if not np.array_equal(encoded.classes, self.classes_):
            raise ValueError(f"y: expected the classes {self.classes_.tolist()}, got {encoded.classes.tolist()}")
        return self._refit(problem, solution, ridge)

    def decision_function(self, X: Any) -> Any:
        """``[n, L]`` logits, or ``[n]`` for two classes (of the second); an array for arrays, a tensor for tensors.

        Raises:
            ValueError: ``X`` has another number of columns than in `fit`.
        """
        logits = self._logits(X)
        if len(self.classes_) == 2 and not self.multilabel_:
            logits = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return _like(X, logits)

    def predict(self, X: Any) -> Any:
        """``[n]`` labels, or ``[n, L]`` of 0 and 1 for several labels a sample."""
        logits = self._logits(X)
        if self.multilabel_:
            return _like(X, (logits > 0).long())
        rows = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(-1)
        labels = self.classes_[rows.cpu().numpy()]
        # there are no tensors of text
        return (
            torch.from_numpy(labels).to(X.device) if isinstance(X, Tensor) and labels.dtype.kind in "iufb" else labels
        )

    def predict_proba(self, X: Any) -> Any:
        """``[n, L]`` probabilities, which sum to one except for several labels a sample."""
        probs = make_family(self.family).probabilities(self._logits(X))
        if probs.shape[1] == 1:
            probs = torch.cat([1 - probs, probs], 1)
        elif self.family == "ovr" and not self.multilabel_:
            # as scikit-learn does
            probs = probs / probs.sum(-1, keepdim=True)
        return _like(X, probs)

    def _check(self) -> None:
        """Check the arguments; in `fit` again, for scikit-learn sets them on a made estimator."""
        if self.lambdas is not None and self.nec is not None:
            raise ValueError("lambdas, nec: expected one of them, got both")
        if self.nec is not None and self.max_nec is not None:
            raise ValueError("nec, max_nec: expected one of them, got both; max_nec ends a path of penalties")
        if (self.nec is not None or self.max_nec is not None) and self.alpha == 0:
            raise ValueError("alpha: a ridge alone leaves no weight at zero, so nec and max_nec need alpha above 0")
        if any(not (lam >= 0 and math.isfinite(lam)) for lam in _as_list(self.lambdas)):
            raise ValueError(f"lambdas: expected numbers of at least 0, got {self.lambdas}")
        if any(not (level > 0 and math.isfinite(level)) for level in _as_list(self.nec)):
            raise ValueError(f"nec: expected positive numbers of effective concepts, got {self.nec}")
        for name, given in (("lambdas", self.lambdas), ("nec", self.nec)):
            if given is not None and not _as_list(given):
                raise ValueError(f"{name}: expected a number or several, got none")
        if self.n_lambdas < 1 or self.max_iter < 1 or self.group_size < 1:
            raise ValueError(
                f"n_lambdas, max_iter, group_size: expected at least 1, got {self.n_lambdas}, {self.max_iter}, "
                f"{self.group_size}"
            )
        if not 0 < self.eps < 1:
            raise ValueError(f"eps: expected a share in (0, 1), got {self.eps}")
        if not self.tol > 0:
            raise ValueError(f"tol: expected a positive number, got {self.tol}")
        if self.refit_ridge is not None and not self.refit_ridge > 0:
            raise ValueError(f"refit_ridge: expected a positive number or None, got {self.refit_ridge}")
        if self.max_nec is not None and not self.max_nec > 0:
            raise ValueError(f"max_nec: expected a positive number of effective concepts or None, got {self.max_nec}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        make_penalty(self.penalty, self.alpha)
        make_family(self.family)

    def _problem(self, X: Any, y: Any, names: Sequence[str] | None) -> tuple[Problem, EncodedLabels]:
        if hasattr(X, "columns"):
            names = names or [str(column) for column in X.columns]
            X = X.to_numpy()
        X = X if isinstance(X, (Tensor, np.ndarray)) or hasattr(X, "todense") else np.asarray(X)
        design = Design(
            X,
            standardize=self.standardize,
            center=self.fit_intercept,
            dtype=DTYPES[self.dtype],
            device=self.device,
            chunk_size=self.chunk_size,
            distributed=self.distributed,
            names=names,
        )
        if design.columns % self.group_size:
            raise ValueError(f"group_size: {self.group_size} columns a concept do not divide the {design.columns} of X")
        encoded = encode_labels(y, self.family, design)
        family = make_family(self.family)
        return Problem(design, encoded.targets, family, encoded.prevalence, self.fit_intercept), encoded

    def _penalty(self, design: Design) -> Penalty:
        groups = torch.arange(design.columns, device=design.device) // self.group_size
        return make_penalty(self.penalty, self.alpha, groups=groups if self.group_size > 1 else None)

    def _solve(self, problem: Problem, penalty: Penalty, lam: float, start: Point) -> tuple[SparseSolution, Point]:
        solved = solve(problem, penalty, lam, start, self.tol, self.max_iter)
        wanted = tolerance(self.tol, lam, problem.gram.dtype)
        if solved.kkt > wanted:
            warnings.warn(
                f"lambda {lam:.3g}: the optimality conditions are missed by {solved.kkt:.1e} after {self.max_iter} "
                f"steps, expected {wanted:.1e}; raise max_iter or tol, or compute in float64",
                ConvergenceWarning,
                stacklevel=4,
            )
        bias = solved.point.bias
        solution = SparseSolution(
            weight=solved.point.weight,
            # equal shifts of all classes change no probability
            bias=bias - bias.mean() if self.family == "multinomial" else bias,
            mean=problem.design.mean,
            scale=problem.design.scale,
            lam=lam,
            objective=solved.objective,
            kkt=solved.kkt,
            iterations=solved.iterations,
            group_size=self.group_size,
            whole_concepts=self.penalty == "group",
        )
        return solution, solved.point

    def _follow(self, problem: Problem, penalty: Penalty, start: Point, largest: float) -> list[SparseSolution]:
        """Solve for one penalty after another, each from the solution before."""
        lambdas = sorted(_as_list(self.lambdas), reverse=True)
        if self.lambdas is None:
            shares = np.geomspace(1.0, self.eps, self.n_lambdas) if self.n_lambdas > 1 else np.array([self.eps])
            lambdas = [largest * float(share) for share in shares]
        path: list[SparseSolution] = []
        for lam in lambdas:
            solution, start = self._solve(problem, penalty, lam, start)
            path.append(solution)
            if self.max_nec is not None and solution.nec > self.max_nec:
                break
        return path

    def _refit(self, problem: Problem, solution: SparseSolution, ridge: float) -> SparseSolution:
        keep = KeptRidge((solution.weight != 0).to(problem.gram.device))
        weight, bias = solution.weight.to(problem.gram), solution.bias.to(problem.gram)
        start = Point(weight, bias, problem.family.curvature)
        fitted, _ = self._solve(problem, keep, ridge, start)
        return replace(fitted, lam=solution.lam)

    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self)
        x = as_tensor(X)
        self._check_columns(x)
        coef, intercept = (torch.from_numpy(a).to(x.device) for a in (self.coef_, self.intercept_))
        return x.to(coef.dtype) @ coef.T + intercept

    def _check_columns(self, x: Any) -> None:
        if x.ndim != 2 or x.shape[1] != self.n_features_in_:
            raise ValueError(f"X: expected [n, {self.n_features_in_}], as in fit, got {list(x.shape)}")


def at_nec(path: Sequence[SparseSolution], level: float, prune: bool = True) -> SparseSolution:
    """See `ElasticNetPath.at_nec`; the path begins with the largest penalty."""
    enough = [solution for solution in path if solution.nec >= level]
    if not enough:
        return max(path, key=lambda solution: solution.nec)
    found = min(enough, key=lambda solution: solution.nec)
    return found.pruned(level) if prune else found


def _as_list(given: float | Sequence[float] | None) -> list[float]:
    """Numbers in rising order, of one or several."""
    return [] if given is None else sorted(float(number) for number in np.atleast_1d(np.asarray(given, dtype=float)))


def _like(x: Any, result: Tensor) -> Any:
    """The result as ``x`` came: a tensor for tensors, an array for all else."""
    return result if isinstance(x, Tensor) else result.cpu().numpy()
