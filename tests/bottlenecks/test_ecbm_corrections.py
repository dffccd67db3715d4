"""Corrections of an energy-based bottleneck, and what training makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from bottlenecks.plain_ecbm import CLASSES, GROUPED, inputs, joint_energy, model_of, one_hot_joint, told
from lightning.pytorch import Callback
from torch import Tensor
from toy import CLASSES as TOY_CLASSES
from toy import ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import EnergyBottleneck
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.types import Intervention


@pytest.fixture
def model() -> CBMModule:
    return model_of()


def test_a_corrected_concept_stays_where_it_is_put(model: CBMModule) -> None:
    with torch.no_grad():
        plain = model({"embedding": inputs()})
        fixed = model.intervene(plain, told(c0=1.0, c2=0.3))
        again = model.intervene(fixed, told(c1=0.0))
    assert (fixed.concepts.probs[:, 0] == 1.0).all()
    torch.testing.assert_close(fixed.concepts.probs[:, 2], torch.full((6,), 0.3))
    # a second correction keeps the first
    torch.testing.assert_close(again.concepts.probs, torch.tensor([[1.0, 0.0, 0.3]]).expand(6, -1))
    expected = -one_hot_joint(model.bottleneck, again.concepts.probs)
    torch.testing.assert_close(again.logits, expected)


def test_a_correction_on_the_logit_scale(model: CBMModule) -> None:
    values = told(c0=1.0)
    logits = torch.full((6, 3), -1.5)
    with torch.no_grad():
        fixed = model.intervene(model({"embedding": inputs()}), Intervention(values.mask, values.values, logits))
    torch.testing.assert_close(fixed.concepts.probs[:, 0], torch.full((6,), -1.5).sigmoid())


def test_nothing_corrected_is_the_plain_prediction(model: CBMModule) -> None:
    with torch.no_grad():
        plain = model({"embedding": inputs()})
        same = model.intervene(plain, told())
        twice = model.decide(plain.concepts)
    for other in (same, twice):
        assert torch.equal(other.logits, plain.logits)
        assert torch.equal(other.concepts.probs, plain.concepts.probs)


def test_a_concept_that_is_taken_out_leaves_every_energy(model: CBMModule) -> None:
    with torch.no_grad():
        removed = model.intervene(model({"embedding": inputs()}), told(c0=1.0, c1=torch.nan))
        gone = torch.tensor([[False, True, False]]).expand(6, -1)
        expected = torch.stack(
            [
                joint_energy(model.bottleneck, removed.concepts.probs, row.expand(6, -1), gone)
                for row in torch.eye(CLASSES)
            ],
            1,
        )
        torch.testing.assert_close(removed.logits, -expected)
        assert (removed.concepts.values[:, 1] == 0).all()
        # whatever its embeddings are
        model.bottleneck.concept_embeddings[1] += 1.0
        other = model.intervene(removed, told(c1=torch.nan))
    torch.testing.assert_close(other.logits, removed.logits, atol=1e-4, rtol=1e-4)


def test_what_is_taken_out_is_no_correction(model: CBMModule) -> None:
    model.bottleneck.weights = (1.0, 1.0, 0.0)
    with torch.no_grad():
        plain = model({"embedding": inputs()})
        removed = model.intervene(plain, told(c1=torch.nan))
    # the label still rests on the input, as it did
    torch.testing.assert_close(removed.logits, plain.logits)


def test_corrections_pull_on_other_concepts_through_the_joint_energy() -> None:
    x = {"embedding": inputs(40)}
    moved = {}
    for name, weights in {"coupled": (0.0, 1.0, 3.0), "own evidence": (1.0, 1.0, 0.0)}.items():
        model = model_of(correction_weights=weights)
        with torch.no_grad():
            plain = model(x)
            values = (plain.concepts.probs[:, :1] < 0.5).float().expand(-1, 3)
            fixed = model.intervene(plain, Intervention(told(40, c0=1.0).mask, values))
        moved[name] = ((fixed.concepts.probs >= 0.5) != (plain.concepts.probs >= 0.5))[:, 1:].float().mean()
    assert moved["coupled"] > 0.05
    assert moved["own evidence"] < 0.5 * moved["coupled"]


def test_members_of_a_categorical_group_share_their_probability() -> None:
    model = model_of(GROUPED)
    with torch.no_grad():
        plain = model({"embedding": inputs()})
        torch.testing.assert_close(plain.concepts.probs[:, :3].sum(1), torch.ones(6))
        fixed = model.intervene(plain, told(concepts=4, c1=1.0))
    assert (fixed.concepts.probs[:, 1] == 1.0).all()
    assert fixed.concepts.probs.isfinite().all()


def test_what_is_told_of_a_group_outweighs_any_evidence() -> None:
    model = model_of(GROUPED)
    with torch.no_grad():
        plain = model({"embedding": 100.0 * inputs()})
        assert plain.concepts.logits[:, :3].max() > 15
        present = model.intervene(plain, told(concepts=4, c1=1.0)).concepts.probs[:, :3]
        absent = model.intervene(plain, told(concepts=4, c0=0.0, c1=0.0)).concepts.probs[:, :3]
    assert torch.equal(present, torch.tensor([[0.0, 1.0, 0.0]]).expand(6, -1))
    assert torch.equal(absent, torch.tensor([[0.0, 0.0, 1.0]]).expand(6, -1))


class Twins(ToyData):
    """The toy data with a second concept that equals the first; in a quarter of the inputs neither is to be seen."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        rows = toy_tensors(self.sizes[name], seed=["train", "val", "test"].index(name))
        concepts, x = rows["concepts"].clone(), rows["image"].clone()
        concepts[:, 1] = concepts[:, 0]
        x[torch.arange(len(x)) % 4 == 0, 0] = 0.0
        x[:, 1] = 0.0
        label = (concepts[:, 2] + concepts[:, 3]).long()
        return {"embedding": x, "concepts": concepts, "label": label}

    def make_split(self, name: str) -> TensorDataset:
        return TensorDataset(self.tensors(name))


class LossKeeper(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer, model) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture(scope="module")
def trained() -> tuple[CBMModule, LossKeeper]:
    torch.manual_seed(0)
    data, keeper = Twins(n=256), LossKeeper()
    model = CBMModule(
        Identity(6),
        EnergyBottleneck(16),
        concepts=data.concept_set,
        num_classes=TOY_CLASSES,
        concept_loss=ConceptLoss("sum"),
        loss_weights={"label": 3.0},
        lr=0.02,
    )
    quiet_trainer(max_epochs=8, limit_val_batches=0, callbacks=[keeper]).fit(model, data)
    return model, keeper


def test_training_lowers_every_energy_of_the_truth(trained: tuple[CBMModule, LossKeeper]) -> None:
    model, keeper = trained
    assert keeper.losses[-1] < 0.5 * keeper.losses[0]
    tester = quiet_trainer()
    scores = tester.test(model, Twins(), verbose=False)[0]
    assert scores["test/label_acc"] > 0.7
    assert {f"test/loss_{name}" for name in ("label", "concept", "coherence", "association")} <= scores.keys()


def test_correcting_one_of_two_equal_concepts_moves_the_other(trained: tuple[CBMModule, LossKeeper]) -> None:
    model = copy.deepcopy(trained[0]).eval()
    data = Twins()
    data.setup("test")
    rows = data.tensors("test")
    unseen = rows["embedding"][:, 0] == 0
    with torch.no_grad():
        plain = model({"embedding": rows["embedding"][unseen]})
        for value in (0.0, 1.0):
            mask = torch.zeros_like(plain.concepts.probs, dtype=torch.bool)
            mask[:, 0] = True
            fixed = model.intervene(plain, Intervention(mask, torch.full(mask.shape, value)))
            assert ((fixed.concepts.probs[:, 1] >= 0.5) == bool(value)).float().mean() > 0.9


def test_a_checkpoint_and_a_copy_predict_the_same(trained: tuple[CBMModule, LossKeeper], tmp_path) -> None:
    model = copy.deepcopy(trained[0])
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)
    restored = CBMModule.load_from_checkpoint(str(tmp_path / "model.ckpt")).eval()
    batch = Twins().tensors("test")
    with torch.no_grad():
        assert torch.equal(restored(batch).logits, trained[0].eval()(batch).logits)
