"""Maps tell concepts apart only if the data do: two patches that come independently, or always together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.saliency import SaliencyStudy, concept_maps, cooccurrence
from cbm_lightning.saliency.localisation import energy_in_mask
from cbm_lightning.saliency.randomisation import map_similarity
from cbm_lightning.types import Batch

NAMES = ["red", "blue"]
SIDE, PATCH = 32, 8
AREA = PATCH**2 / SIDE**2
METHODS = ["exact", "grad_cam"]


def patches(number: int, tied: bool, seed: int = 0) -> Batch:
    """Noise with a red patch in a random place on the left and a blue one on the right, each in every other image."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.2 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    concepts = torch.rand(number, 2, generator=generator).lt(0.5).float()
    if tied:
        concepts[:, 1] = concepts[:, 0]
    masks = torch.zeros(number, 2, SIDE, SIDE, dtype=torch.bool)
    top = torch.randint(SIDE - PATCH + 1, (number, 2), generator=generator)
    left = torch.randint(SIDE // 2 - PATCH + 1, (number, 2), generator=generator) + torch.tensor([0, SIDE // 2])
    for i, k in concepts.nonzero().tolist():
        place = (slice(top[i, k], top[i, k] + PATCH), slice(left[i, k], left[i, k] + PATCH))
        image[(i, 2 * k, *place)] += 1.0
        masks[(i, k, *place)] = True
    return {"image": image, "concepts": concepts, "concept_masks": masks}


def trained(tied: bool) -> CBMModule:
    """A small convolutional model of the concepts; no label is learned."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 4, stride=4), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()
    )
    model = CBMModule(ModuleBackbone(net, (3, SIDE, SIDE)), LinearBottleneck("logits"), concepts=NAMES, num_classes=2)
    data = patches(512, tied)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        for rows in torch.randperm(512).split(64):
            loss = binary_cross_entropy_with_logits(
                model({"image": data["image"][rows]}).concepts.logits, data["concepts"][rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def tied() -> CBMModule:
    return trained(tied=True)


@pytest.fixture(scope="module")
def separable() -> CBMModule:
    return trained(tied=False)


def both_shown(number: int = 64) -> Batch:
    """Images that nobody trained on, each with both patches: the same question to both models."""
    data = patches(4 * number, tied=True, seed=1)
    rows = data["concepts"].all(1).nonzero()[:number, 0]
    return {name: value[rows] for name, value in data.items()}


def accuracy(model: CBMModule, data: Batch) -> Tensor:
    """``[2]`` of each concept."""
    with torch.no_grad():
        predicted = model(data).concepts.logits > 0
    return (predicted == (data["concepts"] > 0.5)).float().mean(0)


def test_both_models_know_the_concepts_of_their_data(tied: CBMModule, separable: CBMModule) -> None:
    assert accuracy(tied, patches(256, tied=True, seed=2)).min() > 0.95
    assert accuracy(separable, patches(256, tied=False, seed=2)).min() > 0.95


def test_but_the_tied_one_does_not_know_them_apart(tied: CBMModule, separable: CBMModule) -> None:
    alone = patches(512, tied=False, seed=3)
    rows = (alone["concepts"].sum(1) == 1).nonzero()[:, 0]
    alone = {name: value[rows] for name, value in alone.items()}
    assert accuracy(separable, alone).min() > 0.95
    # one patch is read for both concepts, or both for both: what is right for one is wrong for the other
    assert accuracy(tied, alone).sum() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_tied_concepts_cannot_be_told_apart(tied: CBMModule, separable: CBMModule, method: str) -> None:
    data = both_shown()
    red, blue = concept_maps(tied, data["image"], method).unbind(1)
    assert map_similarity(red, blue).mean() > 0.9
    red, blue = concept_maps(separable, data["image"], method).unbind(1)
    assert map_similarity(red, blue).mean() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_only_separable_concepts_are_localised(tied: CBMModule, separable: CBMModule, method: str) -> None:
    data = both_shown()

    def energy(model: CBMModule) -> Tensor:
        """``[2, 2]``: of a concept's map (row) in the mask of a concept (column)."""
        maps, masks = concept_maps(model, data["image"], method), data["concept_masks"]
        return torch.stack(
            [torch.stack([energy_in_mask(maps[:, i], masks[:, j]).values.nanmean() for j in (0, 1)]) for i in (0, 1)]
        )

    found = energy(separable)
    assert found.diagonal().min() > 5 * AREA
    assert found.flip(1).diagonal().max() < AREA
    shared = energy(tied)
    # both concepts look at the same, so that neither has much more on its own patch than on the other's
    assert torch.allclose(shared[0], shared[1], atol=0.03)
    assert (shared.diagonal() / shared.flip(1).diagonal()).min() < 1.2


def test_the_study_and_the_check_of_the_data_say_the_same(tied: CBMModule, separable: CBMModule) -> None:
    data = both_shown()
    found = []
    for model in (tied, separable):
        study = SaliencyStudy(model, metrics=["energy_in_mask"])
        study.update(data)
        found.append(study.compute())
        assert float(found[-1].chance["energy_in_mask"]) == pytest.approx(AREA)
    tied_energy, separable_energy = (float(result.values["energy_in_mask"]) for result in found)
    assert separable_energy > 1.5 * tied_energy
    assert cooccurrence(patches(512, tied=True)["concepts"], NAMES).groups == [[0, 1]]
    assert cooccurrence(patches(512, tied=False)["concepts"], NAMES).groups == []
