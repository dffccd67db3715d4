from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from recorder import STEPS, Log, make, part_of, record, same, states
from torch import Tensor, nn
from toy import CLASSES, ForeignData, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, Phase

# ---------------------------------------------------------------- phases


@pytest.mark.parametrize("preset", ["sequential", "independent"])
@pytest.mark.parametrize("link", ["sigmoid", "logits"])
def test_each_phase_moves_only_its_parts(preset: str, link: str) -> None:
    model = make(LinearBottleneck(link), phases=preset)
    seen = record(model, max_epochs=4)
    assert seen.phases == ["concepts"] * 2 + ["labels"] * 2
    for before, after in zip(seen.weights[:2], seen.weights[1:3], strict=True):
        assert same(part_of(before, "head"), part_of(after, "head"))
        for part in ("backbone", "bottleneck"):
            assert not same(part_of(before, part), part_of(after, part))
        statistics = "backbone.layers.1.running_mean"
        assert not torch.equal(before[statistics], after[statistics])
    for before, after in zip(seen.weights[2:-1], seen.weights[3:], strict=True):
        # parameters, BatchNorm statistics and the bottleneck's value range, bit for bit
        for part in ("backbone", "bottleneck"):
            assert same(part_of(before, part), part_of(after, part))
        assert not same(part_of(before, "head"), part_of(after, "head"))
    assert seen.training[0] == {"backbone": True, "bottleneck": True, "head": False}
    assert seen.training[-1] == {"backbone": False, "bottleneck": False, "head": True}


def test_a_phase_logs_only_what_counts_in_it() -> None:
    log = Log()
    record(make(phases="sequential"), max_epochs=2, logger=log)
    concepts, labels = (set().union(*(row for row in log.rows if row.get("epoch") == epoch)) for epoch in (0, 1))
    for stage in ("train", "val"):
        assert {f"{stage}/{name}" for name in ("loss", "loss_concept", "concept_acc")} <= concepts
        assert not {f"{stage}/{name}" for name in ("loss_label", "label_acc")} & concepts
        assert {f"{stage}/{name}" for name in ("loss", "loss_label", "label_acc")} <= labels
        assert f"{stage}/loss_concept" not in labels


def test_the_independent_head_reads_annotations_in_training_only() -> None:
    model = make(phases="independent")
    read: dict[str, list[Tensor]] = {"train": [], "eval": []}
    model.head.register_forward_pre_hook(
        lambda head, args: read["train" if head.training else "eval"].append(args[0].values)
    )
    record(model, max_epochs=2)
    assert all(set(values.unique().tolist()) == {0.0, 1.0} for values in read["train"])
    assert len(read["train"]) == STEPS
    assert all(len(values.unique()) > 2 for values in read["eval"])


def test_a_detached_head_leaves_the_rest_to_the_concept_loss() -> None:
    both = record(make(phases=[Phase("p", head_input="detached")]))
    alone = record(make(phases=[Phase("p", loss_weights={"label": 0.0})]))
    for part in ("backbone", "bottleneck"):
        assert same(part_of(both.weights[-1], part), part_of(alone.weights[-1], part))
    assert not same(part_of(both.weights[-1], "head"), part_of(alone.weights[-1], "head"))


def test_a_model_trains_whole_again_after_a_fit_in_phases() -> None:
    model = make(phases="sequential")
    assert all(p.requires_grad for p in model.parameters())
    record(model, max_epochs=2)
    assert all(p.requires_grad for p in model.parameters())
    second = record(model, max_epochs=2)
    for part in ("backbone", "bottleneck"):
        assert not same(part_of(second.weights[0], part), part_of(second.weights[1], part))


def test_a_failed_run_leaves_nothing_frozen_for_the_next() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer, model, *_) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("out of memory, say")

    model = make(phases="sequential")
    with pytest.raises(RuntimeError, match="say"):
        record(model, max_epochs=2, callbacks=[Fails()])
    seen = record(model, max_epochs=2, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False)])
    linear = "backbone.layers.0.weight"
    assert torch.equal(seen.weights[0][linear], seen.weights[1][linear])
    assert not same(part_of(seen.weights[0], "bottleneck"), part_of(seen.weights[1], "bottleneck"))


def test_parts_frozen_by_the_user_stay_frozen_in_every_phase() -> None:
    model = make(backbone=ToyBackbone(dropout=0.2, frozen=True), phases=[Phase("a", epochs=1), Phase("b", epochs=1)])
    seen = record(model, max_epochs=2)
    assert same(part_of(seen.weights[0], "backbone"), part_of(seen.weights[-1], "backbone"))
    assert [len(rates) for rates in seen.rates] == [2] * len(seen.rates)
    model = make(backbone=ToyBackbone(freeze_norm=True))
    seen = record(model)
    assert torch.equal(
        seen.weights[0]["backbone.layers.1.running_var"], seen.weights[-1]["backbone.layers.1.running_var"]
    )
    assert not torch.equal(seen.weights[0]["backbone.layers.1.weight"], seen.weights[-1]["backbone.layers.1.weight"])


# ---------------------------------------------------------------- learning rates and schedulers


def test_learning_rates_a_part_and_a_phase() -> None:
    phases = [Phase("a", epochs=1), Phase("b", epochs=1, lr=0.5, train=["head"]), Phase("c", epochs=1)]
    seen = record(make(phases=phases, lr_multipliers={"backbone": 0.1, "head": 3.0}), max_epochs=3)
    expected = [[0.002, 0.02, 0.06]] * STEPS + [[0.05, 0.5, 1.5]] * STEPS + [[0.002, 0.02, 0.06]] * STEPS
    torch.testing.assert_close(torch.tensor(seen.rates), torch.tensor(expected))


def schedule(lr: float, kind: str, epochs: int) -> list[float]:
    """The learning rate of every step of a phase, by torch alone."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    steps = epochs * STEPS
    make_one = {
        "StepLR": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps),
        "CosineAnnealingLR": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "PolynomialLR": lambda: torch.optim.lr_scheduler.PolynomialLR(optimizer, steps),
    }
    scheduler, rates = make_one[kind](), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if kind != "StepLR" or (step + 1) % STEPS == 0:
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR", "CosineAnnealingLR", "PolynomialLR"])
def test_schedulers_start_anew_in_each_phase(kind: str) -> None:
    spec: Any = {"class_path": kind, "init_args": {"step_size": 1, "gamma": 0.5}} if kind == "StepLR" else kind
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    phases = [Phase("a", epochs=2), Phase("b", epochs=3, lr=0.1, train=["head"])]
    model = make(phases=phases, lr_multipliers={"head": 2.0}, lr_scheduler=spec, optimizer=sgd)
    seen = record(model, max_epochs=5)
    for column, factor in enumerate([1.0, 1.0, 2.0]):
        expected = schedule(0.02 * factor, kind, 2) + schedule(0.1 * factor, kind, 3)
        assert [rates[column] for rates in seen.rates] == pytest.approx(expected, rel=1e-6)


def test_a_plateau_is_judged_within_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    plateau = {"class_path": "ReduceLROnPlateau", "init_args": {"patience": 0, "factor": 0.1, "threshold": 0.0}}
    model = make(phases=[Phase("a", epochs=3), Phase("b", epochs=3)], lr_scheduler=plateau, monitor="val/fake")
    values = iter([1.0, 2.0, 0.5, 5.0, 4.0, 6.0])

    def fake(self: CBMModule) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/fake", next(values))

    monkeypatch.setattr(CBMModule, "on_validation_epoch_end", fake)
    seen = record(model, max_epochs=6)
    # 5.0 is worse than all before it, but it is the first of its phase
    assert [rates[0] for rates in seen.rates[::STEPS]] == pytest.approx([0.02, 0.02, 0.002, 0.02, 0.02, 0.02])


def test_weight_decay_is_what_was_asked_for() -> None:
    seen: list[float] = []

    class Look(Callback):
        def on_train_start(self, trainer, model) -> None:
            seen.extend(group.get("weight_decay", -1) for group in trainer.optimizers[0].param_groups)

    for options in ({}, {"weight_decay": 0.3}, {"optimizer": "Rprop"}):
        quiet_trainer(fast_dev_run=True, callbacks=[Look()]).fit(make(**options), ToyData())
    assert seen == [0.0] * 3 + [0.3] * 3 + [-1] * 3
    with pytest.raises(ValueError, match=r"weight_decay: Rprop has none, got 0\.3"):
        make(optimizer="Rprop", weight_decay=0.3)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "OneCycle"}, "lr_scheduler: no LRScheduler is called 'OneCycle'; near matches.*OneCycleLR"),
        ({"lr_scheduler": "ReduceLROnPlateau"}, "monitor: ReduceLROnPlateau follows a logged value.*got none"),
        ({"lr_scheduler": {"class_path": "StepLR", "init_args": {"gama": 1}}}, r"StepLR takes .* not \['gama'\]"),
        ({"optimizer": {"class_path": "SGD", "init_args": {"momentum": -1.0}}}, "Invalid momentum value"),
    ],
)
def test_bad_optimizers_and_schedulers_fail_at_construction(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            ModelCheckpoint(monitor="val/label_acc"),
            "ModelCheckpoint monitors 'val/label_acc'.*not logged in.*'concepts'",
        ),
        (ModelCheckpoint(monitor="val/loss_concept"), "'val/loss_concept', which is not logged in phase 'labels'"),
        (ModelCheckpoint(monitor="val/loss"), "'val/loss', which means another sum in each phase"),
        (EarlyStopping(monitor="val/loss_label"), "EarlyStopping monitors 'val/loss_label'"),
        (EarlyStopping(monitor="val/concept_acc"), "may end the run before phase 'labels'.*min_epochs above 2"),
    ],
)
def test_monitors_that_a_phase_does_not_log_are_refused(callback: Callback, message: str, tmp_path) -> None:
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "callbacks": [callback]}
    with pytest.raises(ValueError, match=message):
        record(make(phases="sequential"), max_epochs=4, **options)


def test_monitors_that_all_phases_log_are_accepted(tmp_path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val/concept_acc", mode="max", filename="best")
    stop = EarlyStopping("val/concept_acc", mode="max", patience=0)
    options = {"enable_checkpointing": True, "max_epochs": 6, "min_epochs": 5}
    seen = record(make(phases="sequential"), callbacks=[keep, stop], **options)
    assert seen.phases == ["concepts"] * 3 + ["labels"] * 2
    assert (tmp_path / "best.ckpt").is_file()
    joint = record(make(), max_epochs=9, callbacks=[EarlyStopping("val/loss", patience=0, min_delta=9.0)])
    assert len(joint.phases) == 2
    with pytest.raises(ValueError, match="lr_scheduler monitors 'val/label_acc'"):
        record(make(phases="sequential", lr_scheduler="ReduceLROnPlateau", monitor="val/label_acc"), max_epochs=2)


def test_a_conflict_of_epochs_shows_both_numbers() -> None:
    with pytest.raises(ValueError, match="the phases take 5 epochs, but the Trainer's max_epochs is 4"):
        record(make(phases=[Phase("a", epochs=2), Phase("b", epochs=3)]), max_epochs=4)


def test_nothing_to_train_is_an_error() -> None:
    model = make(phases="joint")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        record(model)


# ---------------------------------------------------------------- the Trainer's own options


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2},
        {"num_sanity_val_steps": 0, "limit_val_batches": 0},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bottleneck", [LinearBottleneck("logits"), EmbeddingBottleneck(4)], ids=["linear", "cem"])
def test_the_trainers_options_work_in_phases(options: dict, bottleneck) -> None:
    model = make(type(bottleneck)(**bottleneck._init_args), phases="sequential", lr_scheduler="OneCycleLR")
    seen = record(model, max_epochs=4, **options)
    assert same(part_of(seen.weights[2], "backbone"), part_of(seen.weights[-1], "backbone"))
    assert not same(part_of(seen.weights[2], "head"), part_of(seen.weights[-1], "head"))
    assert all(torch.isfinite(tensor).all() for tensor in seen.weights[-1].values())
    if model.bottleneck.statistics_size:
        assert (model.bottleneck.value_range.abs() != 5.0).all()


def test_accumulated_steps_count_once_in_the_schedule() -> None:
    # 6 batches at 4 a step: two steps an epoch, the second from a leftover of two batches
    seen = record(make(phases="sequential", lr_scheduler="OneCycleLR"), max_epochs=4, accumulate_grad_batches=4)
    first, second = [rates[0] for rates in seen.rates[:12]], [rates[0] for rates in seen.rates[12:]]
    assert first == pytest.approx(second)
    assert len(set(first)) == 4
    assert max(first) == pytest.approx(0.02, rel=0.2)


def test_each_accumulated_batch_draws_its_own_corrections() -> None:
    model, masks = make(EmbeddingBottleneck(4, randint=0.5)), []
    draw = model.bottleneck.training_mask
    model.bottleneck.training_mask = lambda *args: masks.append(draw(*args)) or masks[-1]
    record(model, accumulate_grad_batches=3)
    assert len(masks) == len({tuple(mask.flatten().tolist()) for mask in masks}) == STEPS


def test_clipping_bounds_the_step() -> None:
    sgd = {"class_path": "SGD"}
    moved = {}
    for clip in (None, 0.01):
        torch.manual_seed(0)
        seen = record(make(optimizer=sgd, lr=1.0), limit_train_batches=1, gradient_clip_val=clip, max_epochs=1)
        names = [name for name in seen.weights[0] if "running" not in name and "num_batches" not in name]
        moved[clip] = sum((seen.weights[1][n].float() - seen.weights[0][n]).square().sum() for n in names) ** 0.5
    assert moved[0.01].item() == pytest.approx(0.01, rel=1e-3)
    assert moved[None] > 0.02


def test_runs_limited_by_steps_alone() -> None:
    seen = record(make(lr_scheduler="OneCycleLR"), max_epochs=-1, max_steps=10)
    assert [rates[0] for rates in seen.rates] == pytest.approx(one_cycle(10))
    phases = [Phase("a", epochs=1), Phase("b", train=["head"])]
    seen = record(make(phases=phases, lr_scheduler="OneCycleLR"), max_epochs=-1, max_steps=16)
    assert [rates[0] for rates in seen.rates] == pytest.approx(one_cycle(6) + one_cycle(10))
    seen = record(make(lr_scheduler="CosineAnnealingLR"), max_epochs=50, max_steps=7)
    assert seen.rates[-1][0] < 0.002
    with pytest.raises(ValueError, match="OneCycleLR needs total_steps, and the phase has no end"):
        record(make(lr_scheduler="OneCycleLR"), max_epochs=-1)


def one_cycle(steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02, momentum=0.9)
    scheduler, rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_dry_run_runs_the_first_phase() -> None:
    model = make(phases=[Phase("a", epochs=3), Phase("b", epochs=3, train=["head"])], lr_scheduler="OneCycleLR")
    assert record(model, fast_dev_run=True).phases == ["a"]


def test_overfitting_a_batch_and_validating_first() -> None:
    model, data = make(phases="sequential"), ToyData()
    trainer = quiet_trainer(max_epochs=2)
    before = trainer.validate(model, data, verbose=False)[0]
    assert {"val/loss_label", "val/loss_concept", "val/label_acc", "val/concept_auroc"} <= set(before)
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]
    assert set(after) == set(before)
    loader = ForeignData().train_dataloader()
    trainer = quiet_trainer(max_epochs=60, overfit_batches=1)
    model = make(backbone=ToyBackbone(16))
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["train/label_acc"] == 1.0


def test_our_loaders_allow_overfitting() -> None:
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        seen = record(make(), max_epochs=1, overfit_batches=2)
    assert len(seen.rates) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised and caught within dynamo
def test_a_compiled_module_trains_like_a_plain_one() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make(backbone=ToyBackbone())
        trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=0)
        trainer.fit(torch.compile(model, backend="eager") if compiled else model, ToyData())
        results.append(states(model))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-4, atol=1e-5)


def test_a_users_own_optimizer_keeps_its_rates() -> None:
    class Mine(CBMModule):
        def configure_optimizers(self):
            groups = [{"params": self.head.parameters(), "lr": 0.7, "name": "head"}]
            return torch.optim.SGD(groups, lr=0.1)

    model = Mine(ToyBackbone(), concepts=4, num_classes=CLASSES, phases="sequential")
    seen = record(model, max_epochs=2, limit_train_batches=1, callbacks=[])
    assert seen.rates == [[0.7], [0.7]]
