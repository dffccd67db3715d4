"""Numbers of the official code of Koh et al. (ICML 2020): groups of concepts in random orders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import accuracies, answered, engine_of, linear_model, load, steps_along
from torch import Tensor

from cbm_lightning.interventions import Person
from cbm_lightning.randomness import Randomness

LINKS = ("sigmoid", "logits")
# the official flag says whether concepts that nobody can see are set to 0
INVISIBLE = {"visible0": "use_label", "visible1": "zero"}


def trials(shared: Path, link: str, label_level: str, visible: str) -> tuple[Tensor, dict[str, Tensor]]:
    """``[T, R]`` our accuracies in percent along the stored permutations, and the fixture."""
    data = load(shared, f"koh_tti_{link}")
    model, prediction = linear_model(data, link, None if link == "sigmoid" else (data["ptl_5"], data["ptl_95"]))
    label = data["class_labels"]
    person = Person(model.concept_set, label_level, INVISIBLE[visible])
    person.class_concepts = torch.full((model.num_classes, len(model.concept_set)), torch.nan)
    person.class_concepts[label] = data["class_level_concepts"].float()
    certainty = (data["certainty"] != 1).float()
    concepts = data["instance_level_concepts"].float()
    answers = person.answer(concepts, label, certainty, Randomness(0, "person", torch.arange(len(label))))
    samples, engine = answered(prediction, answers, label), engine_of(model, "group")
    curves = [
        accuracies(engine, samples, steps_along(permutation, len(label))) for permutation in data["group_permutations"]
    ]
    return 100 * torch.stack(curves), data


@pytest.mark.parametrize("visible", INVISIBLE)
@pytest.mark.parametrize("label_level", ["class", "instance"])
@pytest.mark.parametrize("link", LINKS)
def test_accuracy_of_each_trial_and_of_their_mean(shared: Path, link: str, label_level: str, visible: str) -> None:
    ours, data = trials(shared, link, label_level, visible)
    official = data[f"acc_per_trial__{label_level}_level__{visible}"]
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.mean(0), official.mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("link", LINKS)
def test_the_best_of_several_trials_is_not_what_to_expect_of_one(shared: Path, link: str) -> None:
    """The official function returns the maximum over trials, which overstates random interventions."""
    ours, data = trials(shared, link, "class", "visible0")
    best = data["OFFICIAL_max_over_trials__class_level__visible0"]
    torch.testing.assert_close(ours.amax(0), best, rtol=0, atol=1e-4)
    assert (ours.mean(0) <= best + 1e-4).all()
    assert (ours.mean(0) < best - 1).any()
    # nothing is random before the first correction and after the last one
    torch.testing.assert_close(ours.mean(0)[[0, -1]], best[[0, -1]], rtol=0, atol=1e-4)
