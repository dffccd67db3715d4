"""Accuracy at numbers of effective concepts: every number against the estimator, or a fit, driven by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sparsity.problems import linear_problem, several_labels
from torch import Tensor
from torch.nn import functional

from cbm_lightning.sparsity import ElasticNetPath, NECResult, NECStudy, keep_largest, nec
from cbm_lightning.sparsity.design import ConstantConceptWarning
from cbm_lightning.sparsity.study import Scores

CONCEPTS, CLASSES, LEVELS = 8, 3, [1, 2.5, 8]
TRAIN, TEST, FEATURES = slice(0, 150), slice(150, None), 10
RIDGE = 1e-2
# the path ends before it has every concept
SHORT = {"eps": 0.03}
KINDS = ["path", "path_refit", "pruned", "pruned_refit", "random", "random_refit"]
OUTPUTS = {"multiclass": CLASSES, "binary": 1, "multilabel": CLASSES}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(task: str = "multiclass", columns: int = CONCEPTS) -> Scores:
    """Scores, features that mix them with noise, and labels."""
    if task == "multilabel":
        x, y = several_labels(230, columns)
    else:
        x, y = linear_problem(230, columns)
    y = (y > 0).long() if task == "binary" else y
    pooled = x[:, :4] @ drawn(4, FEATURES, seed=7) + 0.5 * drawn(230, FEATURES, seed=8)
    return Scores(x, pooled, y)


def part(whole: Scores, rows: Any) -> Scores:
    return Scores(whole.values[rows], whole.pooled[rows], whole.label[rows])


def pair(some: Scores) -> tuple[Tensor, Tensor]:
    return some.values, some.label


def head(task: str = "multiclass", columns: int = CONCEPTS) -> tuple[Tensor, Tensor]:
    return drawn(OUTPUTS[task], columns, seed=3), drawn(OUTPUTS[task], seed=4)


def study(task: Any = "multiclass", **options: Any) -> NECStudy:
    solver = {**SHORT, **options.pop("solver", {})}
    options = {"levels": LEVELS, "refit_ridge": RIDGE, **options}
    return NECStudy(CONCEPTS, OUTPUTS[task], task, solver=solver, **options)


def judge(made: NECStudy, whole: Scores, own: Any = None) -> NECResult:
    made.fit(part(whole, TRAIN), own)
    made.add(part(whole, TEST))
    return made.finish()


@cache
def usual() -> NECResult:
    return judge(study(), scores(), head())


def accuracy(logits: Tensor, label: Tensor, task: str) -> float:
    if task == "multiclass":
        return float((logits.argmax(-1) == label).double().mean())
    return float(((logits > 0).long() == label.view(len(logits), -1)).double().mean())


def path(task: str, **options: Any) -> ElasticNetPath:
    family = "multinomial" if task == "multiclass" else "ovr"
    return ElasticNetPath(**{"nec": LEVELS, "family": family, **SHORT, **options})


@contextmanager
def no_short_path() -> Iterator[None]:
    """A path that leaves fewer concepts than asked for warns of it, which the study does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nec: the smallest penalty")
        yield


def kept_only(weight: Tensor, bias: Tensor, x: Tensor, level: float, width: int = 1) -> tuple[Tensor, Tensor]:
    """A head pruned by hand: the largest weights of standardised scores, and the mean of what goes in the bias."""
    sizes = (weight * x.std(0)).unflatten(1, (-1, width))
    mask = keep_largest(sizes, level).repeat_interleave(width, 1)
    return weight * mask, bias + (weight * ~mask) @ x.mean(0)


def refit_by_hand(weight: Tensor, x: Tensor, label: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Least loss plus ridge over the weights that are not zero, in double precision by quasi-Newton steps."""
    mask, scale, mean = (weight != 0).double(), x.double().std(0), x.double().mean(0)
    z = (x.double() - mean) / scale
    free = torch.zeros_like(mask, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([free, bias], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = z @ (free * mask).T + bias
        if task == "multiclass":
            found = functional.cross_entropy(logits, label)
        else:
            targets = label.view(len(logits), -1).double()
            found = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
        found = found + RIDGE / 2 * (free * mask).square().sum()
        found.backward()
        return found

    search.step(loss)
    fitted = (free * mask).detach() / scale
    return fitted.float(), (bias.detach() - fitted @ mean).float()


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("task", OUTPUTS)
def test_every_number_is_that_of_the_path_driven_by_hand(task: str) -> None:
    whole, own = scores(task), head(task)
    result = judge(study(task), whole, own)
    train, test = part(whole, TRAIN), part(whole, TEST)
    directions = drawn(FEATURES, CONCEPTS, seed=0)
    inputs = {"path": (train.values, test.values), "random": (train.pooled @ directions, test.pooled @ directions)}
    for kind, (x, on) in inputs.items():
        fitted = path(task)
        with no_short_path():
            fitted.fit(x, train.label)
        for i, level in enumerate(LEVELS):
            plain = fitted.at_nec(level)
            refit = fitted.refit(plain, x, train.label, RIDGE)
            for name, solution in {kind: plain, f"{kind}_refit": refit}.items():
                found = result.curves[name]
                assert found.accuracy[i] == pytest.approx(accuracy(solution.logits(on), test.label, task), abs=1e-6)
                assert found.nec[i] == solution.nec
    for i, level in enumerate(LEVELS):
        weight, bias = kept_only(*own, train.values, level)
        expected = accuracy(test.values @ weight.T + bias, test.label, task)
        assert result.curves["pruned"].accuracy[i] == pytest.approx(expected, abs=1e-6)
        assert result.curves["pruned"].nec[i] == nec(weight) == pytest.approx(level, abs=0.5 / OUTPUTS[task])
        weight, bias = refit_by_hand(weight, train.values, train.label, task)
        expected = accuracy(test.values @ weight.T + bias, test.label, task)
        assert result.curves["pruned_refit"].accuracy[i] == pytest.approx(expected, abs=1e-6)
    assert list(result.curves) == KINDS
    assert (result.samples, result.levels) == (80, LEVELS)


def test_the_curves_say_something() -> None:
    result = usual()
    assert result.curves["path"].accuracy[-1] > result.curves["path"].accuracy[0] > 1 / CLASSES
    assert result.curves["path"].anec > result.curves["random"].anec + 0.1
    assert result.curves["path"].anec > result.curves["pruned"].anec + 0.1
    assert result.curves["pruned_refit"].anec > result.curves["pruned"].anec + 0.1


@pytest.mark.parametrize("levels", [[3.0], [8, 15, 30]])
def test_one_level_is_enough(levels: list[float]) -> None:
    found = judge(study(levels=levels), scores(), head())
    assert found.levels == [min(levels[0], CONCEPTS)]
    assert found.table()["accuracy"].tolist() == [found.curves[kind].anec for kind in KINDS]
    assert found.curves["path"].accuracy > usual().curves["path"].accuracy[:1]


def test_levels_above_the_number_of_concepts_become_it() -> None:
    result = judge(study(levels=[30, 4, 10, 5]), scores())
    assert result.levels == [4, 5, CONCEPTS]
    assert result.scalars()["path/anec"] == pytest.approx(np.mean(result.curves["path"].accuracy))


def test_what_is_not_asked_for_is_not_fitted() -> None:
    result = judge(study(refit_ridge=None, random_concepts=False), scores())
    assert (list(result.curves), result.own) == (["path"], None)


def test_the_kept_weights_are_those_of_the_path_at_the_lowest_level() -> None:
    whole = scores()
    result = judge(study(levels=[8, 2]), whole)
    with no_short_path():
        expected = path("multiclass", nec=[2, 8]).fit(*pair(part(whole, TRAIN))).at_nec(2)
    assert torch.equal(result.kept, expected.weight.unsqueeze(-1))
    assert nec(result.kept) == 2


# ---------------------------------------------------------------- random concepts


def test_random_concepts_depend_on_the_seed_only() -> None:
    whole, curves = scores(), []
    for seed, state in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        curves.append(judge(study(seed=seed, refit_ridge=None), whole).curves)
        assert torch.equal(torch.get_rng_state(), before)
    assert curves[0] == curves[1]
    assert curves[0]["path"] == curves[2]["path"]
    assert curves[0]["random"] != curves[2]["random"]


def test_random_concepts_read_the_features_and_nothing_else() -> None:
    whole = scores()
    other = Scores(drawn(*whole.values.shape, seed=9), whole.pooled, whole.label)
    one, two = (judge(study(), each).curves for each in (whole, other))
    assert one["random"] == two["random"]
    assert one["random_refit"] == two["random_refit"]
    assert one["path"] != two["path"]


# ---------------------------------------------------------------- the model's own head


@pytest.mark.parametrize("task", OUTPUTS)
def test_a_head_that_is_sparser_than_a_level_keeps_its_own_accuracy(task: str) -> None:
    whole, (weight, bias) = scores(task), head(task)
    weight = torch.where(torch.arange(CONCEPTS) < 1, weight, 0.0)
    result = judge(study(task), whole, (weight, bias))
    test = part(whole, TEST)
    expected = accuracy(test.values @ weight.T + bias, test.label, task)
    assert result.curves["pruned"].accuracy == pytest.approx([expected] * 3, abs=1e-6)
    assert result.curves["pruned"].nec == [1.0] * 3
    assert (result.own.nec, result.own.active_concepts, result.own.empty_classes) == (1.0, 1, 0)


def test_pruning_does_not_depend_on_the_units_of_a_concept() -> None:
    whole, (weight, bias) = scores(), head()
    units = torch.logspace(-2, 2, CONCEPTS)
    other = Scores(whole.values * units, whole.pooled, whole.label)
    one = judge(study(), whole, (weight, bias))
    two = judge(study(), other, (weight / units, bias))
    assert two.curves["pruned"] == one.curves["pruned"]
    assert two.curves["pruned_refit"] == one.curves["pruned_refit"]
    # the weights as they come would have others kept
    assert not torch.equal(keep_largest(weight / units, 2), keep_largest(weight, 2))


def test_the_own_head_is_only_read() -> None:
    own = head()[0].requires_grad_(), head()[1].requires_grad_()
    before = own[0].detach().clone()
    result = judge(study(), scores(), own)
    assert torch.equal(own[0], before)
    assert own[0].grad is None
    assert result.curves["pruned"] == usual().curves["pruned"]


# ---------------------------------------------------------------- concepts of several numbers


def test_concepts_of_several_numbers_are_kept_whole() -> None:
    whole, (weight, bias) = scores(columns=2 * CONCEPTS), head(columns=2 * CONCEPTS)
    result = judge(study(group_size=2), whole, (weight, bias))
    train, test = part(whole, TRAIN), part(whole, TEST)
    fitted = path("multiclass", group_size=2)
    with no_short_path():
        fitted.fit(train.values, train.label)
    for i, level in enumerate(LEVELS):
        solution = fitted.at_nec(level)
        assert result.curves["path"].nec[i] == nec(solution.weight.unflatten(1, (CONCEPTS, 2))) <= level + 0.2
        expected = accuracy(solution.logits(test.values), test.label, "multiclass")
        assert result.curves["path"].accuracy[i] == pytest.approx(expected, abs=1e-6)
        kept, moved = kept_only(weight, bias, train.values, level, width=2)
        expected = accuracy(test.values @ kept.T + moved, test.label, "multiclass")
        assert result.curves["pruned"].accuracy[i] == pytest.approx(expected, abs=1e-6)
    assert result.own.nec == CONCEPTS
    assert result.kept.shape == (CLASSES, CONCEPTS, 2)


# ---------------------------------------------------------------- solvers and classes


@pytest.mark.parametrize(
    ("task", "solver"),
    [
        ("multiclass", {"alpha": 0.5, "tol": 1e-4}),
        ("multiclass", {"family": "ovr"}),
        ("multiclass", {"penalty": "group"}),
        ("multiclass", {"dtype": "float64"}),
        ("multilabel", {"dtype": "float64"}),
        ("multiclass", {"standardize": False}),
        ("multiclass", {"fit_intercept": False}),
        ("multiclass", {"chunk_size": 64}),
        ("binary", {"family": "multinomial"}),
    ],
    ids=str,
)
def test_options_go_to_the_solver(task: str, solver: dict[str, Any]) -> None:
    whole = scores(task)
    result = judge(study(task, solver=solver), whole, head(task))
    train, test = part(whole, TRAIN), part(whole, TEST)
    fitted = path(task).set_params(**solver)
    with no_short_path():
        fitted.fit(train.values, train.label)
    for i, level in enumerate(LEVELS):
        logits = fitted.at_nec(level).logits(test.values.to(fitted.at_nec(level).weight.dtype))
        if task == "binary":
            logits = logits[:, 1:] - logits[:, :1]
        found = result.curves["path"].accuracy[i]
        assert found == pytest.approx(accuracy(logits, test.label, task), abs=1e-6)
    assert list(result.curves) == KINDS


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
@pytest.mark.parametrize("unseen", range(CLASSES))
def test_a_class_without_a_training_sample(unseen: int, family: str) -> None:
    whole = scores()
    train, test = (part(part(whole, rows), part(whole, rows).label != unseen) for rows in (TRAIN, TEST))
    made = study(solver={"family": family}, refit_ridge=RIDGE)
    made.fit(train, head())
    made.add(test)
    curves = made.finish().curves
    fitted = path("multiclass", family=family)
    with no_short_path():
        fitted.fit(train.values, train.label)
    for i, level in enumerate(LEVELS):
        solution = fitted.at_nec(level)
        for name, each in (("path", solution), ("path_refit", fitted.refit(solution, *pair(train), RIDGE))):
            fitted.coef_, fitted.intercept_ = each.coef.numpy(), each.intercept.numpy()
            expected = float((fitted.predict(test.values) == test.label).double().mean())
            assert curves[name].accuracy[i] == pytest.approx(expected, abs=1e-6)
        if family == "multinomial":
            weight, _ = kept_only(*head(), train.values, level)
            seen, rows = train.label.unique(return_inverse=True)
            weight, bias = refit_by_hand(weight[seen], train.values, rows, "multiclass")
            expected = float((seen[(test.values @ weight.T + bias).argmax(-1)] == test.label).double().mean())
            assert curves["pruned_refit"].accuracy[i] == pytest.approx(expected, abs=1e-6)
    # with all weights kept, whichever head they came from, the fit is that of the two classes
    assert curves["pruned_refit"].accuracy[-1] == pytest.approx(curves["path_refit"].accuracy[-1], abs=0.05)
    assert curves["pruned_refit"].accuracy[-1] > 0.8


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_two_classes_of_one_softmax(family: str) -> None:
    whole = scores("binary")
    made = NECStudy(CONCEPTS, 2, levels=LEVELS, solver={**SHORT, "family": family}, refit_ridge=RIDGE)
    own = drawn(2, CONCEPTS, seed=3), drawn(2, seed=4)
    curves = judge(made, whole, own).curves
    expected = judge(study("binary"), whole).curves["path_refit"].accuracy[-1]
    assert curves["path_refit"].accuracy[-1] == pytest.approx(expected, abs=0.05)
    assert curves["pruned_refit"].accuracy[-1] == pytest.approx(expected, abs=0.05)


def test_a_constant_concept_is_named_and_its_share_of_the_own_head_kept() -> None:
    whole, (weight, bias) = scores(), head()
    whole.values[:, 2] = 1.5
    names = [f"concept {k}" for k in range(CONCEPTS)]
    with pytest.warns(ConstantConceptWarning) as said:
        result = judge(study(names=names), whole, (weight, bias))
    assert {str(each.message).split("[")[1].split("]")[0] for each in said} == {"'concept 2'"}
    test = part(whole, TEST)
    expected = accuracy(test.values @ weight.T + bias, test.label, "multiclass")
    assert result.curves["pruned"].accuracy[-1] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- copies and checks


def test_a_copy_judges_for_itself() -> None:
    whole = scores()
    first = study()
    first.fit(part(whole, TRAIN), head())
    first.add(part(whole, slice(150, 180)))
    second = first.copy()
    second.add(part(whole, slice(180, None)))
    one, two = first.finish(), second.finish()
    assert (one.samples, two.samples) == (30, 50)
    both = usual()
    for kind in KINDS:
        assert one.curves[kind].nec == two.curves[kind].nec == both.curves[kind].nec
        mixed = [
            (30 * a + 50 * b) / 80 for a, b in zip(one.curves[kind].accuracy, two.curves[kind].accuracy, strict=True)
        ]
        assert mixed == pytest.approx(both.curves[kind].accuracy, abs=1e-6)
    assert one.curves != two.curves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, r"levels: expected one or more positive numbers of effective concepts, got \[\]"),
        ({"levels": [5, -1]}, r"levels: expected one or more positive numbers .*, got \[5, -1\]"),
        ({"solver": {"aplha": 0.5}}, "solver: .*aplha"),
        ({"solver": {"alpha": 2.0}}, "alpha"),
        ({"solver": {"tol": 0.0}}, "tol: expected a positive number, got 0"),
        ({"solver": {"family": "softmax"}}, "family: expected one of"),
        ({"solver": {"dtype": "float16"}}, "dtype: expected one of"),
    ],
)
def test_bad_options_are_told_before_a_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**options).check()
