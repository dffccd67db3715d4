from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from recorder import STEPS, Log, Recorder, make, record, same, states
from toy import ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, LinearBottleneck, Phase
from cbm_lightning.concepts import ConceptSet


@pytest.mark.parametrize("scheduler", [None, "OneCycleLR"])
def test_the_rate_finder_sets_every_group_and_the_schedule(scheduler: str | None, tmp_path) -> None:
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1.0, num_training_steps=40)
    model = make(phases="sequential", lr_multipliers={"backbone": 0.1, "head": 2.0}, lr_scheduler=scheduler)
    before = states(model)
    seen = record(model, max_epochs=10, callbacks=[finder], default_root_dir=tmp_path)
    found = finder.optimal_lr.suggestion()
    assert found not in (None, 0.02)
    assert model.lr == model.hparams["lr"] == found
    assert same(before, seen.weights[-11])  # the search left no trace in the weights
    expected = torch.tensor([0.1, 1.0, 2.0]) * found
    rates = torch.tensor(seen.rates[-10 * STEPS :])
    peak = rates if scheduler is None else torch.stack([rates[: 5 * STEPS].amax(0), rates[5 * STEPS :].amax(0)])
    torch.testing.assert_close(peak, expected.expand_as(peak), rtol=2e-3, atol=0.0)
    if scheduler:
        torch.testing.assert_close(rates[[0, 5 * STEPS]], (expected / 25).expand(2, 3))
    assert not list(tmp_path.glob(".lr_find*"))


def test_the_batch_size_finder_finds_and_restores(tmp_path) -> None:
    finder = BatchSizeFinder(init_val=8, max_trials=3, steps_per_trial=2)
    data, model = ToyData(batch_size=4), make(LinearBottleneck("logits"), phases="sequential")
    before = states(model)
    seen = record(model, data, max_epochs=2, callbacks=[finder], default_root_dir=tmp_path)
    assert data.batch_size == finder.optimal_batch_size == 32
    assert len(seen.rates) == 2 * 3
    assert same(before, seen.weights[0])
    assert not list(tmp_path.glob(".scale_batch_size*"))


@pytest.mark.parametrize("validate", [True, False])
def test_averaged_weights_are_tested_and_saved(tmp_path, validate: bool) -> None:
    groups = {"look": ["red", "round"], "feel": ["small", "wet"]}
    concepts = ConceptSet(ToyData().concept_set.names, groups, "categorical")
    data = ToyData()
    model = make(LinearBottleneck("logits"), concepts=concepts, data=data, phases="sequential")
    buffers = {
        name: b.clone() for name, b in model.named_buffers() if not b.is_floating_point() and "num_b" not in name
    }
    assert buffers
    keep = ModelCheckpoint(tmp_path, filename="last")
    ema = EMAWeightAveraging(decay=0.6)
    plain = Recorder()
    options = {} if validate else {"limit_val_batches": 0}
    trainer = quiet_trainer(max_epochs=4, callbacks=[ema, plain, keep], enable_checkpointing=True, **options)
    trainer.fit(model, data)
    final = states(model)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(final, saved["state_dict"])
    assert same(plain.weights[-1], saved["current_model_state"])
    assert not same(final, plain.weights[-1])
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in buffers.items())
    if validate:
        torch.testing.assert_close(final["bottleneck.value_range"], plain.weights[-1]["bottleneck.value_range"])
    loaded = CBMModule.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    rows = toy_tensors(7)
    assert torch.equal(loaded(rows).logits, model.eval()(rows).logits)


def test_backbone_finetuning_epoch_by_epoch() -> None:
    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.5, backbone_initial_ratio_lr=0.1, train_bn=False
    )
    seen = record(make(lr_multipliers={"head": 2.0}), max_epochs=5, callbacks=[finetuning])
    by_epoch = seen.rates[::STEPS]
    # BatchNorm trains from the start in the backbone's own group; the rest of the backbone joins in a fourth one
    assert by_epoch[:2] == [[0.02, 0.02, 0.04]] * 2
    assert [rates[:3] for rates in by_epoch[2:]] == [[0.02, 0.02, 0.04]] * 3
    assert [rates[3] for rates in by_epoch[2:]] == pytest.approx([0.002, 0.003, 0.0045])
    names = ["backbone.layers.0.weight", "backbone.layers.0.bias"]
    for epoch in range(5):
        moved = [not torch.equal(seen.weights[epoch][name], seen.weights[epoch + 1][name]) for name in names]
        assert moved == [epoch >= 2] * 2


def test_phases_respect_what_a_callback_froze() -> None:
    phases = [Phase("warm up", train=["bottleneck", "head"], epochs=2), Phase("all", epochs=3)]
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=3, train_bn=False, lambda_func=lambda epoch: 1.0)
    seen = record(make(phases=phases), max_epochs=5, callbacks=[finetuning])
    name = "backbone.layers.0.weight"
    moved = [not torch.equal(a[name], b[name]) for a, b in zip(seen.weights[:-1], seen.weights[1:], strict=True)]
    assert moved == [False, False, False, True, True]
    # unfrozen while the phase keeps it still: it moves as soon as the phase lets it
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, lambda_func=lambda epoch: 1.0)
    seen = record(make(phases=phases), max_epochs=5, callbacks=[finetuning])
    moved = [not torch.equal(a[name], b[name]) for a, b in zip(seen.weights[:-1], seen.weights[1:], strict=True)]
    assert moved == [False, False, True, True, True]


def test_the_rate_monitor_sees_the_rates_of_a_phase_from_its_first_epoch() -> None:
    step = {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    model = make(phases=[Phase("a", epochs=2), Phase("b", epochs=2, lr=0.1)], lr_scheduler=step)
    log = Log()
    record(model, max_epochs=4, callbacks=[LearningRateMonitor()], logger=log)
    rates = [row["lr-AdamW/head"] for row in log.rows if "lr-AdamW/head" in row]
    assert rates == pytest.approx([0.02, 0.01, 0.1, 0.05])
