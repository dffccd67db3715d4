"""CTL and ICL: the published numbers, what counts, and what does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from metrics.leakage.worlds import rows, world

from cbm_lightning.metrics import ConceptTaskLeakage, InterConceptLeakage
from cbm_lightning.metrics.leakage import Evidence, concept_task_leakage, entropy, inter_concept_leakage


def evidence_of(golden, name: str) -> Evidence:
    values = torch.from_numpy(golden[name])
    values = values if values.ndim == 3 else values.unsqueeze(-1)
    concepts, label = (torch.from_numpy(golden[key]) for key in ("concepts", "class_labels"))
    return Evidence(values, concepts.double(), label, "multiclass", int(label.max()) + 1)


@pytest.mark.parametrize("name", ["clean", "leaky", "embedding"])
def test_ctl_of_the_published_code(shared, name: str) -> None:
    golden = np.load(shared / "golden" / "dev" / "leakage_mi.npz")
    found = concept_task_leakage(evidence_of(golden, "embedding_nkh" if name == "embedding" else f"soft_{name}"))
    expected = torch.from_numpy(golden[f"CTL_per_concept_{name}"])
    torch.testing.assert_close(found.per_concept.clamp(min=0), expected, atol=0.01, rtol=0)
    assert found.value == pytest.approx(golden[f"CTL_{name}"].item(), abs=0.01)


@pytest.mark.parametrize("name", ["clean", "leaky"])
def test_icl_of_the_published_code(shared, name: str) -> None:
    golden = np.load(shared / "golden" / "dev" / "leakage_mi.npz")
    found = inter_concept_leakage(evidence_of(golden, f"soft_{name}"))
    torch.testing.assert_close(
        found.per_concept, torch.from_numpy(golden[f"ICL_per_concept_{name}"]), atol=0.01, rtol=0
    )
    assert found.value == pytest.approx(golden[f"ICL_{name}"].item(), abs=0.01)


def test_the_concept_that_leaks_is_found_and_no_other() -> None:
    found = concept_task_leakage(world(leak=3.0).settled())
    assert found.per_concept[0] > 5 * found.concept_error[0]
    assert (found.per_concept[1:] < 3 * found.concept_error[1:]).all()
    # the third bit of three
    assert found.per_concept[0].item() == pytest.approx(1 / 3, abs=0.06)
    clean = concept_task_leakage(world().settled())
    assert (clean.per_concept < 3 * clean.concept_error).all()


def test_hard_concepts_leak_exactly_nothing() -> None:
    concepts, label, _ = rows()
    found = concept_task_leakage(Evidence(concepts.unsqueeze(-1), concepts, label, "multiclass", 8).settled())
    assert found.value == 0.0
    assert found.per_concept.tolist() == [0.0] * 3


def test_a_concept_with_one_value_counts_nowhere() -> None:
    given = world(leak=3.0)
    given.concepts[:, 1] = 1.0
    given = given.settled()
    task = concept_task_leakage(given)
    assert task.per_concept.isnan().tolist() == [False, True, False]
    assert task.value == pytest.approx(task.per_concept[[0, 2]].clamp(min=0).mean().item())
    between = inter_concept_leakage(given)
    assert between.per_concept.isnan().tolist() == [False, True, False]
    assert between.value == pytest.approx(between.per_concept[[0, 2]].mean().item())


def test_a_prediction_that_never_varies_says_nothing() -> None:
    """No less than nothing either: what is lost is what the true concept says."""
    given = world().settled()
    given.values[:, 0] = 0.3
    found = concept_task_leakage(given)
    # a fair coin that is one of the three bits of the label
    assert found.per_concept[0].item() == pytest.approx(-1 / 3, abs=0.02)


def test_a_label_with_one_class_defines_nothing() -> None:
    given = world().settled()
    found = concept_task_leakage(given.rows(given.label == 0))
    assert np.isnan(found.value)
    assert found.per_concept.isnan().all()


def test_unannotated_samples_do_not_count() -> None:
    given = world(leak=3.0, n=300).settled()
    spoilt = world(leak=3.0, n=300).settled()
    spoilt.concepts[200:, 0] = torch.nan
    found = concept_task_leakage(spoilt)
    first = concept_task_leakage(given.rows(torch.arange(200)))
    assert found.per_concept[0].item() == pytest.approx(first.per_concept[0].item(), abs=1e-9)
    whole = concept_task_leakage(given)
    assert torch.equal(found.per_concept[1:], whole.per_concept[1:])


def test_several_labels_count_each_by_itself() -> None:
    given = world(leak=3.0).settled()
    bits = torch.stack([given.label >= 4, given.label % 2 == 1], 1).long()
    several = concept_task_leakage(Evidence(given.values, given.concepts, bits, "multilabel", 2))
    single = [
        concept_task_leakage(Evidence(given.values, given.concepts, bit, "binary", 2)).per_concept
        for bit in bits.unbind(1)
    ]
    torch.testing.assert_close(several.per_concept, torch.stack(single).mean(0))
    assert single[0][0] > 0.8
    assert entropy(bits[:, 0]) == pytest.approx(0.69, abs=0.01)


def test_the_metric_keeps_batches_and_draws_a_number_of_samples() -> None:
    given = world(leak=3.0)
    metric = ConceptTaskLeakage(3, 8, max_samples=200, seed=4)
    for part in torch.arange(600).split(90):
        metric.update(given.values[part, :, 0], given.concepts[part], given.label[part])
    assert len(metric.evidence()) == 200
    assert metric.measure().details["samples"] == 200
    assert metric.compute().item() == pytest.approx(metric.measure().value)
    other = ConceptTaskLeakage(3, 8, max_samples=200, seed=5)
    other.update(given.values, given.concepts, given.label)
    assert other.compute() != metric.compute()
    metric.reset()
    assert metric.values == []


def test_icl_says_how_many_samples_it_is_of() -> None:
    found = [inter_concept_leakage(world(n=n).settled()) for n in (100, 400)]
    assert [each.details["samples"] for each in found] == [100, 400]
    metric = InterConceptLeakage(3, 8)
    given = world(n=100)
    metric.update(given.values, given.concepts, given.label)
    assert metric.compute().item() == pytest.approx(found[0].value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_samples": 10}, "max_samples: expected at least 50"), ({"neighbours": 0}, "neighbours: expected at least")],
)
def test_bad_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptTaskLeakage(3, 8, **options)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected values \[B, 3\] or \[B, 3, m\]"):
        ConceptTaskLeakage(3, 8).update(torch.rand(4, 2), torch.rand(4, 3), torch.zeros(4))
