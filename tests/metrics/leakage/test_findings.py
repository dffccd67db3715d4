"""What is said of measurements: leakage where it is, and nothing where nothing was found."""

from __future__ import annotations

import pytest
import torch

from cbm_lightning.metrics.leakage import Measurement
from cbm_lightning.metrics.leakage.findings import ADVICE, findings, is_found, leaking

NAMES = ["red", "round", "small"]


def conditional(value: float, error: float, each: list[float], **details: float) -> Measurement:
    known = {"share": value / 0.8, "nll": 0.8, "accuracy": 0.7, **details}
    return Measurement(value, error, torch.tensor(each), torch.full((3,), error), known)


def task(each: list[float], error: float = 0.01) -> Measurement:
    values = torch.tensor(each)
    return Measurement(float(values.clamp(min=0).mean()), error, values, torch.full((3,), error))


def say(best: float | None = None, accuracy: float = 0.9, **measured: Measurement) -> str:
    return " ".join(findings(measured, NAMES, accuracy, 1000, best))


def test_leakage_is_said_with_numbers_names_and_advice() -> None:
    said = say(conditional_mi=conditional(0.4, 0.02, [0.3, 0.0, 0.1]))
    assert said.startswith("Label information leaks through the concepts (1000 samples).")
    assert "carry 0.400 ±0.020 nats of label information beyond the true ones, of 0.800 that these" in said
    assert "(50%)" in said
    assert "Each by itself, 2 of 3 concepts carry some of it, most: red (0.300), small (0.100)." in said
    assert said.endswith(ADVICE)


def test_nothing_is_said_plainly() -> None:
    said = say(
        conditional_mi=conditional(0.02, 0.01, [0.02, 0.0, 0.0], extra=0.01, extra_error=0.01),
        ctl=task([0.02, -0.3, 0.01]),
    )
    assert said.startswith("No leakage of label information was found (1000 samples).")
    assert "no label information in the predicted concepts beyond the true ones (0.020 ±0.010 nats)" in said
    assert "No predicted concept says more of the label than its true values do" in said
    assert "free dimensions" not in said
    assert ADVICE not in said


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.97, "lies above"), (0.91, "does not lie above")])
def test_the_best_accuracy_decides_by_itself(accuracy: float, verdict: str) -> None:
    said = say(best=0.9, accuracy=accuracy)
    assert f"{verdict} 0.900, the best that the true concepts allow" in said
    assert (ADVICE in said) == (verdict == "lies above")


def test_a_perfect_accuracy_of_few_samples_has_an_error_too() -> None:
    assert "does not lie above" in " ".join(findings({}, NAMES, 1.0, 4, 0.9))


def test_a_probe_on_the_truth_decides_where_the_best_is_not_known() -> None:
    above = Measurement(0.2, 0.01, details={"acc": 0.9, "ceiling": 0.7})
    assert say(ceiling=above).startswith("Label information leaks")
    below = Measurement(-0.2, 0.01, details={"acc": 0.5, "ceiling": 0.7})
    assert say(ceiling=below).startswith("No leakage")


def test_free_dimensions_leak_too() -> None:
    said = say(conditional_mi=conditional(0.01, 0.02, [0.0] * 3, extra=0.3, extra_error=0.02))
    assert "The free dimensions beside the concepts alone carry 0.300 ±0.020 nats." in said
    assert said.startswith("Label information leaks")


def test_concepts_that_say_what_others_are_for() -> None:
    said = say(conditional_mi=conditional(0.0, 0.01, [0.0] * 3), ctl=task([0.2, 0.0, 0.1]))
    assert said.startswith("Predicted concepts carry label information that belongs to other concepts")
    assert "2 of 3 predicted concepts say more of the label than their true values do" in said
    assert "red (+20%), small (+10%)" in said
    assert said.endswith(ADVICE)


@pytest.mark.parametrize(
    ("gap", "words"), [(0.2, "falls from 0.900 to 0.700"), (-0.05, "rises from"), (0.02, "stays the same")]
)
def test_the_head_on_truth(gap: float, words: str) -> None:
    measured = Measurement(gap, 0.01, details={"acc": 0.9, "acc_on_truth": 0.9 - gap})
    said = say(head_on_truth=measured)
    assert words in said
    # values that the head never met may do that
    assert "leak" not in said


@pytest.mark.parametrize(
    ("excess", "words"), [(0.2, "better than the true ones do, by 0.200"), (0.01, "not found to tell")]
)
def test_impurities(excess: float, words: str) -> None:
    details = {"excess": excess, "excess_error": 0.005, "repeats": 3.0}
    assert words in say(ois=Measurement(0.3, 0.01, details=details))
    said = say(nis=Measurement(0.6, 0.01, details={**details, "truth": 0.6 - excess}))
    assert ("tells it better than" if excess == 0.2 else "not provably better than") in said


def test_completeness_is_said_where_it_is_defined() -> None:
    details = {"acc": 0.8, "probe_acc": 0.9, "chance": 0.1}
    assert "reaches 88%" in say(completeness=Measurement(0.875, 0.01, details=details))
    assert say(completeness=Measurement(float("nan"), float("nan"), details=details)) == ""


def test_what_counts_as_found() -> None:
    assert is_found(0.032, 0.01)
    assert not is_found(0.030, 0.01)
    assert not is_found(-1.0, 0.01)
    assert not is_found(0.0, 0.0)
    assert is_found(0.1, 0.0)
    # many questions, or an error known from few repeats, ask for more
    assert not is_found(0.032, 0.01, among=100)
    assert not is_found(0.1, 0.01, repeats=3)
    assert is_found(0.23, 0.01, repeats=3)
    assert not is_found(float("nan"), float("nan"))
    found = leaking(torch.tensor([0.1, torch.nan, 0.5, 0.01]), torch.tensor([0.01, torch.nan, 0.01, 0.01]))
    assert found == [2, 0]


def test_noise_is_hardly_ever_found() -> None:
    drawn = torch.randn(20000)
    assert sum(is_found(float(x), 1.0) for x in drawn) / 20000 < 0.002
