"""What an evaluation learns from other splits, what it keeps in checkpoints, and that training notices nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from toy import CLASSES, ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import accuracy_of_head, check_same, run, toy_model

from cbm_lightning import CBMModule, LinearBottleneck, MLPHead
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.callbacks import intervention_evaluation as module
from cbm_lightning.callbacks.passes import Positions
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.interventions.person import class_majority
from cbm_lightning.interventions.policies import BehaviouralCloning
from cbm_lightning.interventions.values import conditional_percentile, percentiles
from cbm_lightning.randomness import rng_state

# the models here have drawn weights
pytestmark = [
    pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
TRAIN_BATCHES, EVAL_BATCHES = 6, 3
LEARNS = ["global_error", "global_improvement", "global_greedy", "ucp"]


@pytest.fixture(autouse=True)
def _no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "log_figure", lambda *_: None)


def logits_of(model: CBMModule, rows: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(rows).concepts.logits


def loader(rows: dict[str, Tensor], **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(rows), batch_size=16, collate_fn=TensorDataset.collate, **options)


class Loaders(LightningDataModule):
    """Plain loaders of dict batches over the rows of `ToyData`."""

    def __init__(self, shuffle: bool = False) -> None:
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        return loader(toy_tensors(96, 0), shuffle=self.shuffle)

    def val_dataloader(self):
        return loader(toy_tensors(41, 1))

    def test_dataloader(self):
        return loader(toy_tensors(41, 2))


# ---------------------------------------------------------------- values


def test_percentiles_are_those_of_the_training_split() -> None:
    model = toy_model(LinearBottleneck("logits"))
    evaluation = InterventionEvaluation(["ucp"], values="percentile")
    quiet_trainer(callbacks=[evaluation]).test(model, ToyData(), verbose=False)
    assert model.backbone.calls == TRAIN_BATCHES + EVAL_BATCHES
    rows = toy_tensors(96, 0)
    low, high = percentiles(logits_of(model, rows), (0.05, 0.95))
    torch.testing.assert_close(evaluation.values.logit_range, torch.stack([low, high]))
    test = toy_tensors(41, 2)
    expected = accuracy_of_head(model, low + (high - low) * test["concepts"], test["label"])
    assert evaluation.result.scores("ucp")[0, -1] == expected
    # other classes of loaders, in whatever order
    for data in (Loaders(), Loaders(shuffle=True)):
        check_same(run(model, data, ["ucp"], values="percentile"), evaluation.result)


def test_class_conditional_percentiles_know_the_annotations() -> None:
    model, rows = toy_model(LinearBottleneck("logits")), toy_tensors(96, 0)
    evaluation = InterventionEvaluation(["ucp"], values="class_conditional_percentile")
    quiet_trainer(callbacks=[evaluation]).test(model, ToyData(), verbose=False)
    logits, known = logits_of(model, rows), torch.ones(96, 4, dtype=torch.bool)
    found = evaluation.values.logit_range
    for present, q in enumerate((0.05, 0.95)):
        expected = conditional_percentile(logits, rows["concepts"] == present, known, q, torch.zeros(4))
        torch.testing.assert_close(found[present], expected)


def test_a_limit_of_batches_holds_for_the_training_split() -> None:
    model = toy_model(LinearBottleneck("logits"))
    run(model, policies=["ucp", "global_error"], values="percentile", fit_batches=2)
    assert model.backbone.calls == 2 + 2 + EVAL_BATCHES


def fitted(folder: Path, **options: Any) -> tuple[CBMModule, InterventionEvaluation, Trainer, ModelCheckpoint]:
    """A run with percentiles in validation, and a checkpoint of each epoch."""
    torch.manual_seed(0)
    model = CBMModule(
        ToyBackbone(), LinearBottleneck("logits"), concepts=ToyData().concept_set, num_classes=CLASSES, lr=0.02
    )
    evaluation = InterventionEvaluation(["ucp"], stages=["val"], values="percentile")
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[evaluation, keep], enable_checkpointing=True)
    trainer.fit(model, ToyData(), **options)
    return model, evaluation, trainer, keep


def test_a_checkpoint_brings_its_values_along(tmp_path: Path) -> None:
    model, evaluation, _, keep = fitted(tmp_path)
    expected = run(model, policies=["ucp"], values="percentile")
    again = toy_model(LinearBottleneck("logits"))
    found = run(again, policies=["ucp"], values="percentile", ckpt_path=keep.best_model_path)
    assert again.backbone.calls == EVAL_BATCHES
    check_same(found, expected)
    saved = torch.load(keep.best_model_path, weights_only=True)["callbacks"]
    [state] = [state for name, state in saved.items() if name.startswith("InterventionEvaluation")]
    assert torch.equal(state["values"]["logit_range"], evaluation.values.logit_range)


def test_weights_of_another_time_are_predicted_anew(tmp_path: Path) -> None:
    """Values from a checkpoint serve one evaluation: afterwards the weights may be others."""
    _, _, _, keep = fitted(tmp_path)
    evaluation = InterventionEvaluation(["ucp"], values="percentile")
    trainer = quiet_trainer(callbacks=[evaluation])
    trainer.test(toy_model(LinearBottleneck("logits")), ToyData(), ckpt_path=keep.best_model_path, verbose=False)
    other = toy_model(LinearBottleneck("logits"))
    trainer.test(other, ToyData(), verbose=False)
    expected = torch.stack(list(percentiles(logits_of(other, toy_tensors(96, 0)), (0.05, 0.95))))
    torch.testing.assert_close(evaluation.values.logit_range, expected)


def test_a_resumed_run_takes_the_values_of_its_own_weights(tmp_path: Path) -> None:
    model, whole, _, _ = fitted(tmp_path / "whole")
    again, resumed, _, _ = fitted(
        tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", weights_only=True
    )
    assert torch.equal(again.head.linear.weight, model.head.linear.weight)
    torch.testing.assert_close(resumed.values.logit_range, whole.values.logit_range)
    check_same(resumed.result, whole.result)


# ---------------------------------------------------------------- class concepts


@pytest.mark.parametrize("data", [ToyData, Loaders])
def test_a_person_who_knows_classes_says_what_most_of_them_have(data: Any) -> None:
    model = toy_model()
    train, test = toy_tensors(96, 0), toy_tensors(41, 2)
    majority = class_majority(train["concepts"], train["label"], CLASSES, ToyData().concept_set)
    told = majority[test["label"]]
    assert not torch.equal(told, test["concepts"])
    result = run(model, data(), label_level="class")
    assert (result.scores("ucp")[:, -1] == accuracy_of_head(model, told, test["label"])).all()
    # annotations are read without predicting, and plain loaders have to be read anyway
    assert model.backbone.calls == EVAL_BATCHES  # annotations are read without predicting


# ---------------------------------------------------------------- policies


def test_policies_that_learn_take_any_datamodule() -> None:
    model = toy_model()
    expected = run(model, policies=[*LEARNS, BehaviouralCloning(epochs=2, num_samples=64)])
    # train and validation are predicted once for all policies
    assert model.backbone.calls == TRAIN_BATCHES + 2 * EVAL_BATCHES
    found = run(model, Loaders(), policies=[*LEARNS, BehaviouralCloning(epochs=2, num_samples=64)])
    check_same(found, expected)
    assert run(model, ForeignData(), policies=LEARNS).samples == 48


def test_policies_that_learn_take_the_loaders_of_a_fit() -> None:
    results = []
    for source in ("data", "loaders"):
        model, evaluation = toy_model(lr=1e-9), InterventionEvaluation(LEARNS, stages=["val"], values="percentile")
        trainer = quiet_trainer(callbacks=[evaluation], num_sanity_val_steps=0)
        if source == "data":
            trainer.fit(model, Loaders())
        else:
            trainer.fit(model, Loaders().train_dataloader(), Loaders().val_dataloader())
        results.append(evaluation.result)
    check_same(*results)


@pytest.mark.parametrize(
    ("options", "split"), [({"policies": ["global_error"]}, "val"), ({"values": "percentile"}, "train")]
)
def test_without_that_split_the_error_says_what_to_do(options: dict[str, Any], split: str) -> None:
    message = rf"the {split} split is needed and there is no datamodule with a {split}_dataloader: pass the datamodule"
    with pytest.raises(ValueError, match=message):
        run(toy_model(), loader(toy_tensors(41, 2)), **options)


# ---------------------------------------------------------------- nothing else changes


def global_states() -> list[Any]:
    state = rng_state()
    return [state["python"], state["numpy"][1].tolist(), state["numpy"][2], state["torch"].tolist()]


@pytest.mark.parametrize("data", [ToyData, lambda: Loaders(shuffle=True)], ids=["ours", "shuffled"])
def test_training_is_the_same_with_and_without_it(data: Any) -> None:
    weights, states = [], []
    for watchers in (
        [],
        [InterventionEvaluation(["rand", "cctp", BehaviouralCloning(epochs=1)], stages=["val"], values="percentile")],
    ):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = toy_model(head=MLPHead([5]), backbone=ToyBackbone(dropout=0.5), lr=0.01)
        model.backbone.layers[0].bias.requires_grad_(False)
        trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
        quiet_trainer(max_epochs=2, callbacks=watchers).fit(model, data())
        weights.append(model.state_dict())
        states.append(global_states())
        assert model.training
        assert model.backbone.layers.training
        assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trained
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert states[0] == states[1]


def test_a_test_leaves_no_gradient_and_no_graph() -> None:
    model = toy_model(head=MLPHead([5]))
    model.head.train()
    result = run(model, policies=["cctp", "greedy", "rand"], label_level="class", values="class_conditional_percentile")
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert not any(curve.requires_grad for curves in result.curves.values() for curve in curves.values())


def test_a_loader_with_a_generator_of_its_own_draws_as_it_would_have() -> None:
    """The pass over the training split must not use up what the training loader draws."""
    weights = []
    for watchers in ([], [InterventionEvaluation(["ucp"], stages=["val"], values="percentile")]):
        model = toy_model(lr=0.01)
        train = loader(toy_tensors(96, 0), shuffle=True, generator=torch.Generator().manual_seed(5))
        quiet_trainer(max_epochs=3, callbacks=watchers).fit(model, train, Loaders().val_dataloader())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_validation_in_the_middle_of_an_epoch_leaves_the_training_loader_where_it_was() -> None:
    """Workers that persist serve one iterator at a time: a second one would begin the epoch anew."""
    steps = []
    for watchers in ([], [InterventionEvaluation(["ucp"], stages=["val"], values="percentile")]):
        train = loader(toy_tensors(96, 0), num_workers=1, persistent_workers=True)
        trainer = quiet_trainer(val_check_interval=2, num_sanity_val_steps=0, callbacks=watchers)
        trainer.fit(toy_model(), train, Loaders().val_dataloader())
        steps.append(trainer.global_step)
    assert steps == [TRAIN_BATCHES, TRAIN_BATCHES]


# ---------------------------------------------------------------- positions


def first_seen(make: Any) -> list[int]:
    """Rows that count, in the order of their positions on two processes."""
    found = []
    for rank in (0, 1):
        sampler = make(rank)
        positions = Positions(DataLoader(range(9), batch_size=2, sampler=sampler), world=2, rank=rank)
        drawn = torch.tensor(list(sampler))
        for chunk in drawn.split(2):
            index, first = positions.take(len(chunk))
            found += zip(index[first].tolist(), chunk[first].tolist(), strict=True)
    return [row for _, row in sorted(found)]


def test_repeated_samples_are_told_apart() -> None:
    assert first_seen(lambda rank: DistributedSampler(range(9), 2, rank, shuffle=False)) == list(range(9))
    shuffled = first_seen(lambda rank: DistributedSampler(range(9), 2, rank, seed=4))
    assert sorted(shuffled) == list(range(9))
    assert first_seen(lambda rank: DistributedSampler(range(9), 2, rank, shuffle=False, drop_last=True)) == list(
        range(8)
    )


def test_repeated_samples_of_a_sampler_of_ones_own_are_told_apart() -> None:
    """Lightning wraps it, and the loader's dataset is larger than what the sampler draws."""
    wrapped = first_seen(lambda rank: DistributedSamplerWrapper([3, 1, 7], num_replicas=2, rank=rank, shuffle=False))
    assert wrapped == [3, 1, 7]
