"""Conditional probabilities against sums written out over every concept vector and class."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from bottlenecks.plain_ecbm import (
    CLASSES,
    CONCEPTS,
    GROUPED,
    WIDTH,
    model_of,
    one_hot_energies,
    one_hot_joint,
)

from cbm_lightning.bottlenecks.ecbm_conditionals import (
    Candidates,
    concepts_given_label,
    concepts_given_label_and_concept,
    given_input,
    label_given_concepts,
)
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Intervention

ALL = torch.tensor(list(product([0.0, 1.0], repeat=3)))


def test_of_a_categorical_group_the_likeliest_member_counts() -> None:
    bottleneck = model_of(GROUPED).bottleneck
    unsure = torch.tensor([[0.4, 0.35, 0.25, 0.9], [0.3, 0.45, 0.25, 0.1], [0.9, torch.nan, 0.05, 0.2]])
    same = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    found = bottleneck.concepts_given_label(unsure)
    torch.testing.assert_close(found[:, :3].sum(1), torch.ones(CLASSES))
    assert torch.equal(found, bottleneck.concepts_given_label(same))
    pairs, expected = (bottleneck.concepts_given_label_and_concept(x, 1) for x in (unsure, same))
    torch.testing.assert_close(pairs, expected, equal_nan=True)


def test_the_label_given_the_concepts() -> None:
    bottleneck = model_of().bottleneck
    found = label_given_concepts(bottleneck, ALL)
    torch.testing.assert_close(found, (-one_hot_joint(bottleneck, ALL)).softmax(-1))


def test_concepts_given_the_label_and_another_concept() -> None:
    bottleneck = model_of().bottleneck
    # a concept that is always there, and a vector that never occurs
    observed = ALL[[1, 3, 3, 3, 5, 7, 7]]
    candidates = Candidates.observed(observed * 0.4 + 0.3)
    likely = (-one_hot_joint(bottleneck, ALL)).softmax(-1).detach()
    marginal, pairs = torch.zeros(CLASSES, 3), torch.zeros(CLASSES, 3, 3)
    for y in range(CLASSES):
        weight = {tuple(row): 0.0 for row in ALL.tolist()}
        for row in observed.tolist():
            index = int(row[0] * 4 + row[1] * 2 + row[2])
            weight[tuple(row)] += float(likely[index, y]) / len(observed)
        total = sum(weight.values())
        for k in range(3):
            marginal[y, k] = sum(w for row, w in weight.items() if row[k]) / total
            for j in range(3):
                with_j = sum(w for row, w in weight.items() if row[j])
                pairs[y, j, k] = sum(w for row, w in weight.items() if row[j] and row[k]) / with_j
    torch.testing.assert_close(concepts_given_label(bottleneck, candidates), marginal)
    torch.testing.assert_close(bottleneck.concepts_given_label(observed), marginal)
    for y in range(CLASSES):
        torch.testing.assert_close(concepts_given_label_and_concept(bottleneck, candidates, y), pairs[y])
        torch.testing.assert_close(bottleneck.concepts_given_label_and_concept(observed, y), pairs[y])
    assert not torch.allclose(marginal[0], marginal[1], atol=0.02)


def test_a_condition_that_never_holds_has_no_probability() -> None:
    bottleneck = model_of().bottleneck
    found = bottleneck.concepts_given_label_and_concept(ALL[:4], 0)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


def test_exact_sums_over_every_vector() -> None:
    model = model_of()
    x = torch.randn(2, WIDTH)
    given = Intervention(torch.tensor([[True, False, True], [False, False, True]]), torch.tensor([[1.0, 0.0, 0.0]] * 2))
    given.values[1, 2] = torch.nan  # not known after all
    with torch.no_grad():
        classes, concepts = one_hot_energies(model.bottleneck, x)
        joint = one_hot_joint(model.bottleneck, ALL)
        for condition in (None, given):
            by_concept, by_class = torch.zeros(2, 3), torch.zeros(2, CLASSES)
            for b in range(2):
                for m, row in enumerate(ALL):
                    if condition is not None and b == 0 and (row[0] != 1 or row[2] != 0):
                        continue
                    for y in range(CLASSES):
                        energy = classes[b, y] + joint[m, y] + sum(concepts[b, k, int(row[k])] for k in range(3))
                        by_concept[b] += torch.exp(-energy) * row
                        by_class[b, y] += torch.exp(-energy)
            total = by_class.sum(-1, keepdim=True)
            output = model.bottleneck(model.encode({"embedding": x}))
            found = given_input(model.bottleneck, output, Candidates.every(CONCEPTS), condition)
            torch.testing.assert_close(found.concepts, by_concept / total, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.classes, by_class / total, atol=1e-5, rtol=1e-4)


def test_energies_far_apart_leave_finite_probabilities() -> None:
    model = model_of()
    with torch.no_grad():
        model.bottleneck.concept_weight.mul_(300.0)
        model.bottleneck.class_weight.mul_(300.0)
        output = model.bottleneck(model.encode({"embedding": torch.randn(3, WIDTH)}))
        told = Intervention(torch.ones(3, 3, dtype=torch.bool), (output.probs < 0.5).float())
        found = given_input(model.bottleneck, output, Candidates.every(CONCEPTS), told)
    torch.testing.assert_close(found.concepts, told.values)
    assert found.classes.isfinite().all()


def test_the_vectors_of_categorical_groups_have_one_member() -> None:
    found = Candidates.every(GROUPED)
    assert found.vectors.shape == (6, 4)
    assert (found.vectors[:, :3].sum(1) == 1).all()
    torch.testing.assert_close(found.log_prior.exp(), torch.full((6,), 1 / 6))
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.1], [0.0, 0.0, 1.0, 1.0]])
    prior = Candidates.every(GROUPED, probs).log_prior.exp()
    for vector, found_prior in zip(found.vectors, prior, strict=True):
        member, wet = int(vector[:3].argmax()), bool(vector[3])
        by_sample = [p[member] * (p[3] if wet else 1 - p[3]) for p in probs]
        torch.testing.assert_close(found_prior, sum(by_sample) / 2, atol=1e-4, rtol=0)


def test_the_prior_counts_how_often_a_vector_occurs() -> None:
    rows = torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.2, 0.7], [torch.nan, 1.0]])
    found = Candidates.observed(rows)
    assert found.vectors.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    torch.testing.assert_close(found.log_prior.exp(), torch.tensor([1 / 3, 2 / 3]))


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(ValueError, match="131072 vectors, at most 65536 can be enumerated; use Candidates.observed"):
        Candidates.every(ConceptSet([str(k) for k in range(17)]))
    with pytest.raises(ValueError, match="real-valued"):
        Candidates.every(ConceptSet(["size"], kinds="real"))
    with pytest.raises(ValueError, match="rows without NaN to sum over, got none among 2"):
        Candidates.observed(torch.full((2, 3), torch.nan))
    model = model_of()
    candidates = Candidates.observed(ALL[:2])
    with pytest.raises(ValueError, match="label: expected a class from 0 to 3, got 4"):
        concepts_given_label_and_concept(model.bottleneck, candidates, 4)
    with torch.no_grad():
        output = model.bottleneck(model.encode({"embedding": torch.randn(1, WIDTH)}))
    told = Intervention(torch.tensor([[True, False, False]]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="none agrees with the known concepts"):
        given_input(model.bottleneck, output, candidates, told)
