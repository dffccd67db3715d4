"""Which discovered concept stands for which annotated one, how well, and how well by luck."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics import ConceptPurity
from cbm_lightning.metrics.concept_purity import assign, correlation, somers_d


def drawn(n: int = 60, slots: int = 4, concepts: int = 3, missing: float = 0.2) -> tuple[Tensor, Tensor]:
    """Activations with ties, and annotations that some of them follow, of which some are unknown."""
    annotations = (torch.rand(n, concepts) < 0.4).float()
    activations = torch.randn(n, slots)
    activations[:, 1] += 2 * annotations[:, 0]
    activations[:, 2] -= 2 * annotations[:, 2]
    annotations[torch.rand(n, concepts) < missing] = torch.nan
    return activations.mul(2).round(), annotations


def by_hand(activations: Tensor, annotations: Tensor, score: str) -> np.ndarray:
    found = np.zeros((activations.shape[1], annotations.shape[1]))
    for k, slot in enumerate(activations.unbind(1)):
        for m, concept in enumerate(annotations.unbind(1)):
            known = ~concept.isnan()
            if score == "auroc":
                found[k, m] = 2 * roc_auc_score(concept[known], slot[known]) - 1
            else:
                found[k, m] = np.corrcoef(slot[known], concept[known])[0, 1]
    return found


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("score", ["auroc", "correlation"])
def test_it_is_the_best_of_all_assignments(score: Any, slots: int) -> None:
    activations, annotations = drawn(slots=max(slots, 3))
    activations = activations[:, :slots] if slots > 2 else activations[:, 1:3]
    metric = ConceptPurity(3, score)
    for rows in (slice(0, 13), slice(13, 60)):
        metric.update(activations[rows], annotations[rows])
    scores = by_hand(activations, annotations, score)
    fewer = min(slots, 3)
    best = 0.0
    for rows in permutations(range(slots), fewer):
        for columns in permutations(range(3), fewer):
            best = max(best, sum(abs(scores[r, c]) for r, c in zip(rows, columns, strict=True)) / fewer)
    found = metric.summary()
    assert float(metric.compute()) == pytest.approx(best, abs=1e-5)
    assert float(found.value) == pytest.approx(best, abs=1e-5)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-5)
    assert len(found.slots) == len(found.concepts) == fewer
    assert len(set(found.slots.tolist())) == len(set(found.concepts.tolist())) == fewer
    matched = found.scores[found.slots, found.concepts].abs().mean()
    assert float(matched) == pytest.approx(best, abs=1e-5)


def test_the_best_pairs_need_not_be_the_best_pair() -> None:
    scores = torch.tensor([[0.9, 0.8], [0.85, 0.1]])
    assert [part.tolist() for part in assign(scores)] == [[0, 1], [1, 0]]


def test_the_table_names_pairs_best_first_with_their_sign() -> None:
    metric = ConceptPurity(["red", "round", "wet"])
    activations, annotations = drawn(400, missing=0.0)
    metric.update(activations, annotations)
    table = metric.table()
    assert list(table.columns) == ["slot", "concept", "score"]
    pairs = {row.concept: (row.slot, row.score) for row in table.itertuples()}
    assert pairs["red"][0] == 1
    assert pairs["wet"][0] == 2
    assert pairs["red"][1] > 0.5
    assert pairs["wet"][1] < -0.5
    assert table["score"].abs().is_monotonic_decreasing
    assert table["concept"].iloc[-1] == "round"


def test_chance_is_what_luck_finds_and_grows_with_candidates() -> None:
    annotations = (torch.rand(200, 5) < 0.5).float()
    few, many = torch.randn(200, 5), torch.randn(200, 60)
    found = []
    for activations in (few, many):
        metric = ConceptPurity(5, permutations=20)
        metric.update(activations, annotations)
        found.append(metric.summary())
    assert found[0].chance < found[1].chance
    for summary in found:
        assert float(summary.value) == pytest.approx(float(summary.chance), abs=0.06)
    metric = ConceptPurity(5)
    metric.update(annotations * 3 - 1, annotations)
    assert metric.compute() == 1
    assert metric.summary().chance < 0.2


def test_chance_draws_from_its_own_generator() -> None:
    activations, annotations = drawn()

    def chance(seed: int) -> float:
        metric = ConceptPurity(3, seed=seed, permutations=2)
        metric.update(activations, annotations)
        return float(metric.summary().chance)

    before = torch.get_rng_state()
    assert chance(0) == chance(0) != chance(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_of_samples_changes_nothing() -> None:
    activations, annotations = drawn()
    order = torch.randperm(60)
    found = []
    for rows in (torch.arange(60), order):
        metric = ConceptPurity(3)
        metric.update(activations[rows], annotations[rows])
        found.append(metric.summary())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_permuted_annotations_keep_together() -> None:
    # always of one kind: whatever the order, the pair of annotations is perfectly told by one another
    seen: list[Tensor] = []

    class Watched(ConceptPurity):
        def _scores(self, activations: Tensor, annotations: Tensor) -> Tensor:
            seen.append(annotations)
            return super()._scores(activations, annotations)

    concept = (torch.rand(50, 1) < 0.5).float()
    metric = Watched(2, permutations=3)
    metric.update(torch.randn(50, 2), torch.cat([concept, 1 - concept], 1))
    metric.summary()
    assert len(seen) == 4
    assert all(torch.equal(rows[:, 0], 1 - rows[:, 1]) for rows in seen)
    assert not torch.equal(seen[0], seen[1])


def test_what_never_varies_and_what_is_never_known_does_not_count() -> None:
    activations, annotations = drawn(missing=0.0)
    known = ConceptPurity(3)
    known.update(activations, annotations)
    more = ConceptPurity(5)
    nothing = torch.full((60, 1), torch.nan)
    more.update(activations, torch.cat([torch.ones(60, 1), annotations, nothing], 1))
    found = more.summary()
    assert float(found.value) == float(known.compute())
    assert 0 not in found.concepts
    assert 4 not in found.concepts
    assert found.scores[:, [0, 4]].isnan().all()
    empty = ConceptPurity(1)
    empty.update(activations, nothing)
    assert empty.compute().isnan()
    assert len(empty.table()) == 0


def test_real_valued_concepts_count_with_correlation_alone() -> None:
    concepts = ConceptSet(["wet", "weight"], kinds=["binary", "real"])
    weight = torch.randn(40)
    annotations = torch.stack([(torch.rand(40) < 0.5).float(), weight], 1)
    activations = torch.stack([-3 * weight + 1, annotations[:, 0]], 1)
    auroc, linear = ConceptPurity(concepts), ConceptPurity(concepts, "correlation")
    for metric in (auroc, linear):
        metric.update(activations, annotations)
    assert auroc.table()["concept"].tolist() == ["wet"]
    assert float(linear.compute()) == pytest.approx(1, abs=1e-5)
    assert float(linear.summary().scores[0, 1]) == pytest.approx(-1, abs=1e-5)


def test_constant_activations_stand_for_nothing() -> None:
    present = torch.tensor([True, False, True])
    assert somers_d(torch.ones(3, 2), present).tolist() == [0, 0]
    assert correlation(torch.ones(3, 2), present.float()).tolist() == [0, 0]
    assert somers_d(torch.ones(3, 2), torch.ones(3).bool()).isnan().all()
    assert correlation(torch.randn(3, 2), torch.ones(3)).isnan().all()


def test_states_of_two_processes_are_joined() -> None:
    activations, annotations = drawn()
    whole, parts = ConceptPurity(3), [ConceptPurity(3), ConceptPurity(3)]
    whole.update(activations, annotations)
    for metric, rows in zip(parts, (slice(0, 25), slice(25, 60)), strict=True):
        metric.update(activations[rows], annotations[rows])
    gathered = [torch.cat([part.activations[0] for part in parts]), torch.cat([part.annotations[0] for part in parts])]

    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        return [x for x in gathered if x.shape[1] == state.shape[1]]

    joined = ConceptPurity(3, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    joined.update(activations[:25], annotations[:25])
    torch.testing.assert_close(joined.summary().scores, whole.summary().scores)
    assert joined.summary().chance == whole.summary().chance
    assert joined.compute() == whole.compute()
    assert len(joined.activations[0]) == 25, "what was gathered is given back"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConceptPurity(3, "auc"), "score: expected one of .'auroc', 'correlation'.*got 'auc'"),
        (lambda: ConceptPurity(3, permutations=0), "permutations: expected at least 1, got 0"),
        (lambda: ConceptPurity(3).update(torch.rand(4, 2), torch.rand(4, 2)), r"concepts \[B, 3\], got .*\[4, 2\]"),
        (lambda: ConceptPurity(3).update(torch.rand(4, 2), torch.rand(5, 3)), r"got \[4, 2\] and \[5, 3\]"),
        (lambda: ConceptPurity(2).update(torch.full((1, 2), torch.nan), torch.rand(1, 2)), "activations: .*diverge"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
