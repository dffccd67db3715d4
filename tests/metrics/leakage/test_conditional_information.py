"""I(y; c_hat | c) by probes: known amounts, nothing where nothing leaks, and what probes are made of."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from metrics.leakage.worlds import world

from cbm_lightning.data import RenderedBirds
from cbm_lightning.metrics import ConditionalLeakage
from cbm_lightning.metrics.leakage import Evidence, conditional_information, cross_splits, given_splits
from cbm_lightning.metrics.leakage.conditional_information import TruthProbe
from cbm_lightning.metrics.leakage.evidence import Splits


def measured(evidence: Evidence, splits: Splits | None = None, **options):
    evidence = evidence.settled()
    return conditional_information(evidence, splits or cross_splits(len(evidence), 3, 1), **options)


def test_a_bit_that_no_concept_has_is_found_in_full() -> None:
    found = measured(world(leak=4.0))
    # the third bit is fair and independent of the concepts
    assert found.details["nll"] == pytest.approx(math.log(2), abs=0.06)
    assert found.value == pytest.approx(math.log(2), abs=0.08)
    assert found.details["share"] == pytest.approx(found.value / found.details["nll"])
    assert found.details["accuracy"] == pytest.approx(0.5, abs=0.06)
    assert found.value > 10 * found.error
    assert found.per_concept[0] > 0.5
    assert (found.per_concept[1:] < 3 * found.concept_error[1:] + 1e-9).all()


def test_what_the_probe_misses_of_the_truth_is_no_leakage_of_a_concept() -> None:
    # twelve classes and few samples: the probe on the truth has much left to learn
    concepts, label = RenderedBirds(
        num_train=1, num_val=1, num_test=600, within_class_variation=0.3, kept_groups=["body colour", "beak"]
    ).annotations("test")
    found = measured(Evidence(concepts.unsqueeze(-1), concepts, label, "multiclass", 12), cross_splits(600, 5, 1))
    assert found.details["nll"] > 0.5
    assert found.per_concept.abs().max() < 0.006


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_found_where_nothing_leaks(seed: int) -> None:
    given = world(seed=seed)
    for values in (given.values, given.concepts.unsqueeze(-1), torch.randn(600, 3, 4)):
        found = measured(Evidence(values, given.concepts, given.label, "multiclass", 8), seed=seed, per_concept=False)
        assert abs(found.value) < max(3 * found.error, 1e-3)


def test_a_model_that_errs_does_not_leak() -> None:
    """Concepts that are wrong half of the time say less than the truth, and nothing beyond it."""
    given = world()
    wrong = torch.where(torch.rand(600, 3) < 0.5, 1 - given.concepts, given.concepts)
    found = measured(Evidence(wrong.unsqueeze(-1), given.concepts, given.label, "multiclass", 8))
    assert abs(found.value) < max(3 * found.error, 1e-3)


def test_free_dimensions_count_as_a_whole() -> None:
    given = world()
    third = (given.label >= 4).float()
    # neither of the two says anything alone
    mask = torch.randint(0, 2, (600,)).float()
    extra = torch.stack([mask, (mask - third).abs()], 1)
    found = measured(Evidence(given.values, given.concepts, given.label, "multiclass", 8, extra))
    assert found.value > 0.4
    assert found.details["extra"] > 0.3
    assert found.details["extra"] > 5 * found.details["extra_error"]
    assert (found.per_concept < 3 * found.concept_error + 1e-9).all()


def test_embeddings() -> None:
    found = measured(world(leak=4.0, width=5))
    assert found.value == pytest.approx(math.log(2), abs=0.1)
    assert int(found.per_concept.argmax()) == 0


def test_what_the_probe_on_the_truth_missed_is_no_leakage() -> None:
    """Concepts and free dimensions that are the truth itself carry nothing beyond it, however poor that probe."""
    given = world()
    truth = given.concepts
    evidence = Evidence(truth.unsqueeze(-1), truth, given.label, "multiclass", 8, truth[:, :2]).settled()
    splits = cross_splits(600, 3, 1)
    probe = TruthProbe(evidence, splits)
    probe.logits = torch.zeros_like(probe.logits)
    probe.nll = probe.judged(probe.loss(probe.logits))
    found = conditional_information(evidence, splits, probe=probe)
    assert found.details["nll"] < 1.0 < probe.nll.mean()
    assert abs(found.value) < 0.05
    assert found.per_concept.abs().max() < 0.05
    assert abs(found.details["extra"]) < 0.05


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels(task: str) -> None:
    given = world(leak=4.0)
    bits = torch.stack([given.label // 4, given.label % 2], 1)
    label = bits if task == "multilabel" else bits[:, :1]
    found = measured(Evidence(given.values, given.concepts, label, task, 2))
    assert found.value == pytest.approx(math.log(2), abs=0.08)
    assert found.details["nll"] == pytest.approx(math.log(2), abs=0.06)


def test_incomplete_annotations_leave_samples_out() -> None:
    given = world(leak=4.0).settled()
    given.concepts[:300, 1] = torch.nan
    found = conditional_information(given, cross_splits(600, 3, 1), per_concept=False)
    assert found.details["samples"] == 300
    assert found.per_concept is None
    assert found.value == pytest.approx(math.log(2), abs=0.1)
    given.concepts[:, 1] = torch.nan
    with pytest.raises(ValueError, match="only 0 samples are annotated completely"):
        conditional_information(given, cross_splits(600, 3, 1))


def test_single_concepts_are_measured_alike_in_one_go_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts draw other weights, so equal within the noise of probes."""
    whole = measured(world(leak=4.0))
    monkeypatch.setattr(sys.modules[TruthProbe.__module__], "AT_ONCE", 1)
    parts = measured(world(leak=4.0))
    assert (whole.value, whole.details) == (parts.value, parts.details)
    torch.testing.assert_close(parts.per_concept, whole.per_concept, atol=0.05, rtol=0)


def test_rows_are_judged_by_probes_that_never_saw_them() -> None:
    splits = cross_splits(100, 4, 3, seed=1)
    fit, hold, judge = splits
    assert fit.shape == (3, 4, 100)
    assert not (fit & hold).any()
    assert not (fit & judge).any()
    assert not (hold & judge).any()
    assert (fit | hold | judge).all()
    assert (judge.sum(1) == 1).all()
    assert not torch.equal(judge[0], judge[1])
    assert torch.equal(splits.judge, cross_splits(100, 4, 3, seed=1).judge)

    apart = torch.arange(100) >= 60
    fit, hold, judge = given_splits(apart, 2)
    assert ((fit | hold) == apart).all()
    assert (judge == ~apart).all()
    # random labels cannot be learned: what looks like it would be rows that were fitted on
    given = Evidence(torch.randn(300, 3, 1), torch.randn(300, 3), torch.randint(0, 2, (300,)), "binary", 2).settled()
    assert TruthProbe(given, cross_splits(300)).nll.mean() > 0.68


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cross_splits(20, 3), "probes need at least 30 samples for 3 folds, got 20"),
        (lambda: given_splits(torch.arange(50) < 5), "at least 10 samples to be fitted on and one to be judged on"),
        (lambda: given_splits(torch.ones(50, dtype=torch.bool)), "one to be judged on, got 50 and 0"),
        (lambda: ConditionalLeakage(2, 2, folds=1), "folds, repeats: expected at least 2 and 1"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_metric_is_deterministic_and_works_in_inference_mode() -> None:
    given = world(leak=4.0, n=200)
    with torch.inference_mode():
        metric = ConditionalLeakage(3, 8, repeats=1)
        for part in torch.arange(200).split(64):
            metric.update(given.values[part].clone(), given.concepts[part].clone(), given.label[part].clone())
        state = torch.get_rng_state()
        first = metric.compute()
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    again = ConditionalLeakage(3, 8, repeats=1)
    again.update(given.values, given.concepts, given.label)
    assert torch.equal(again.compute(), first)
    assert first > 0.3
