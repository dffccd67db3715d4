"""Zeros that survive: checkpoints, resumes, averaged weights, several processes, and input that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from recorder import STEPS, Recorder, make, part_of, same, states
from sparsity_script import SCHEDULES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from toy import ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, LinearBottleneck, MLPHead
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import SparsitySchedule
from cbm_lightning.sparsity.masks import mask_of, restore_masks

HEAD = "head.linear.weight"
EPOCHS = 4
CUBIC: dict[str, Any] = {"mode": "cubic", "target_nec": 4 / 3, "begin": 0.1, "end": 0.8}
ADAPTIVE: dict[str, Any] = {"mode": "adaptive", "target_nec": 2, "strength": 0.02, "end": 0.6, "finetune": 0.3}
RAMP: dict[str, Any] = {"mode": "linear", "strength": 0.1, "begin": 0.0, "end": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def model(**options: Any) -> CBMModule:
    return make(LinearBottleneck("logits", randint=0.2), **{"lr": 0.05, **options})


def run(
    made: LightningModule, *callbacks: Callback, ckpt: Path | None = None, data: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Final weights of a run, or of the rest of one."""
    options = {"max_epochs": EPOCHS, **options}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = quiet_trainer(callbacks=list(callbacks), enable_checkpointing=saves, **options)
    torch.manual_seed(1)
    trainer.fit(made, ToyData() if data is None else data, ckpt_path=ckpt, weights_only=True)
    return states(made)


def keep(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, **options})


# ---------------------------------------------------------------- resumes


@pytest.mark.parametrize("options", [CUBIC, ADAPTIVE, RAMP], ids=lambda options: options["mode"])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_the_whole(options: Any, averaged: bool, tmp_path: Path) -> None:
    def callbacks(name: str) -> list[Callback]:
        average = [EMAWeightAveraging(decay=0.8)] if averaged else []
        return [*average, SparsitySchedule(**options), keep(tmp_path / name)]

    whole = run(model(), *callbacks("whole"))
    assert 0 < int((whole[HEAD] == 0).sum()) < 12
    # in the ramp, and for the adaptive one in the finetuning
    for epoch in (0, 1, 2):
        torch.manual_seed(7)
        resumed = run(model(), *callbacks(f"from {epoch}"), ckpt=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert same(whole, resumed), epoch


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_in_the_middle_of_an_epoch_keeps_its_zeros_and_its_progress(tmp_path: Path) -> None:
    steps = keep(tmp_path / "whole", every_n_train_steps=1, filename="{step}")
    run(model(), SparsitySchedule(**CUBIC), steps)
    middle = STEPS + 3
    weights = torch.load(tmp_path / "whole" / f"step={middle}.ckpt", weights_only=True)["state_dict"]
    again = keep(tmp_path / "rest", every_n_train_steps=1, filename="{step}")
    resumed = run(model(), SparsitySchedule(**CUBIC), again, ckpt=tmp_path / "whole" / f"step={middle}.ckpt")
    zero = weights[HEAD] == 0
    assert 0 < int(zero.sum()) < 8
    assert (resumed[HEAD][zero] == 0).all()
    assert int((resumed[HEAD] != 0).sum()) == 4
    for step in range(middle + 1, STEPS * EPOCHS + 1):
        counts = [
            int((torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=True)["state_dict"][HEAD] != 0).sum())
            for name in ("whole", "rest")
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_schedule_can_be_added_to_a_run_that_had_none(averaged: bool, tmp_path: Path) -> None:
    average = [lambda: EMAWeightAveraging(decay=0.8)] if averaged else []
    run(model(), *(each() for each in average), keep(tmp_path / "plain"), max_epochs=2)
    late = SparsitySchedule(mode="cubic", target_nec=1, begin=0.5, end=0.9)
    made = model()
    callbacks = [*(each() for each in average), late, keep(tmp_path / "late")]
    final = run(made, *callbacks, ckpt=tmp_path / "plain" / "epoch=1.ckpt")
    assert int((final[HEAD] != 0).sum()) == 3
    assert torch.equal(mask_of(made, HEAD), (final[HEAD] != 0).float())


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("options", [CUBIC, ADAPTIVE, RAMP], ids=lambda options: options["mode"])
def test_zeros_survive_a_checkpoint_and_training_without_the_schedule(options: Any, tmp_path: Path) -> None:
    made = model()
    final = run(made, SparsitySchedule(**options), keep(tmp_path, filename="last", save_top_k=1))
    loaded = CBMModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(states(loaded), final)
    zero = final[HEAD] == 0
    if options is RAMP:
        assert [name for name, _ in loaded.named_buffers() if "mask" in name] == []
        return
    assert torch.equal(mask_of(loaded, HEAD) == 0, zero)
    trained = run(loaded, max_epochs=2)
    assert torch.equal(trained[HEAD] == 0, zero)
    assert not torch.equal(trained[HEAD], final[HEAD])


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("optimizer", ["AdamW", {"class_path": "SGD", "init_args": {"momentum": 0.9}}])
def test_zeros_survive_a_resume_without_the_schedule(optimizer: Any, tmp_path: Path) -> None:
    run(model(optimizer=optimizer), SparsitySchedule(**CUBIC), keep(tmp_path), max_epochs=2)
    before = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    after = run(model(optimizer=optimizer), ckpt=tmp_path / "epoch=1.ckpt")
    # the optimizer brings momentum from before the weights were pruned
    assert torch.equal(after[HEAD] == 0, before[HEAD] == 0)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_frozen_head_can_be_restored(tmp_path: Path) -> None:
    run(model(), SparsitySchedule(**CUBIC), keep(tmp_path), max_epochs=2)
    made = model()
    made.head.requires_grad_(False)
    before = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    tester = quiet_trainer()
    tester.test(made, ToyData(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True, verbose=False)
    assert torch.equal(made.head.linear.weight, before[HEAD])


# ---------------------------------------------------------------- averaged weights


class Seen(Callback):
    """The weights that validation judges."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_validation_batch_start(self, trainer, model, *args) -> None:
        if not trainer.sanity_checking and args[1] == 0:
            self.weights.append(model.get_parameter(HEAD).detach().clone())


@pytest.mark.parametrize("options", [CUBIC, ADAPTIVE, RAMP], ids=lambda options: options["mode"])
def test_averaged_weights_have_the_zeros_of_the_training(options: Any, tmp_path: Path) -> None:
    plain = Recorder()
    run(model(), SparsitySchedule(**options), plain)
    raw, seen = Recorder(), Seen()
    average = EMAWeightAveraging(decay=0.8)
    final = run(model(), average, SparsitySchedule(**options), seen, raw, keep(tmp_path))
    # the training knows nothing of the average
    assert len(raw.weights) == len(plain.weights)
    heads = [[part_of(weights, "head") for weights in each.weights[1:]] for each in (plain, raw)]
    assert all(same(*pair) for pair in zip(*heads, strict=True))
    assert not torch.equal(final[HEAD], raw.weights[-1][HEAD])
    for epoch in range(EPOCHS):
        zero = raw.weights[epoch + 1][HEAD] == 0
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert (seen.weights[epoch][zero] == 0).all()
        assert (saved["state_dict"][HEAD][zero] == 0).all()
        assert torch.equal(saved["current_model_state"][HEAD] == 0, zero)
    assert torch.equal(final[HEAD] == 0, zero)
    assert 0 < int(zero.sum()) < 12


def test_a_checkpoint_more_does_not_change_the_average(tmp_path: Path) -> None:
    def average(*others: Callback) -> Tensor:
        callbacks = [EMAWeightAveraging(decay=0.9), SparsitySchedule(**RAMP), *others]
        return run(model(), *callbacks, limit_val_batches=0)[HEAD]

    often = keep(tmp_path, every_n_train_steps=1, filename="{step}")
    assert torch.equal(average(), average(often))


@pytest.mark.parametrize("make_average", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(0.01)])
def test_averaging_after_the_schedule_would_lose_the_zeros(make_average: Any) -> None:
    with pytest.raises(ValueError, match="must come after the callback that averages weights.*swap them"):
        run(make(backbone=Identity(6)), SparsitySchedule(**CUBIC), make_average())


def test_stochastic_averages_before_the_schedule_end_with_its_zeros() -> None:
    average = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    final = run(make(backbone=Identity(6)), average, SparsitySchedule(**CUBIC))
    assert int((final[HEAD] != 0).sum()) == 4


# ---------------------------------------------------------------- one object, several fits


def test_the_second_fit_of_a_schedule_is_like_the_first() -> None:
    for options in (RAMP, ADAPTIVE):
        schedule = SparsitySchedule(**options)
        first, second = run(model(), schedule), run(model(), schedule)
        assert same(first, second), options["mode"]


class Fail(Callback):
    """Ends a run with an error."""

    def on_train_batch_end(self, *args) -> None:
        raise RuntimeError("out of memory")


def test_a_run_that_failed_leaves_nothing_behind() -> None:
    schedule = SparsitySchedule("head.*weight", **RAMP)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model(head=MLPHead([5])), schedule, Fail())
    assert same(run(model(), schedule), run(model(), SparsitySchedule("head.*weight", **RAMP)))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_a_pruned_model_can_be_pruned_further(mode: Any) -> None:
    made = model()
    for target in (3, 1):
        options = {"mode": mode, "strength": 1e-3, "target_nec": target, "begin": 0.0, "end": 0.4, "finetune": 0.4}
        final = run(made, SparsitySchedule(**options))
        assert int((final[HEAD] != 0).sum()) == 3 * target


# ---------------------------------------------------------------- users' own modules


class TwoPlayers(LightningModule):
    """Two optimizers that step by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, layer in zip(self.optimizers(), (self.first, self.second), strict=True):
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(layer(batch["image"]), batch["label"]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_masks(self, checkpoint["state_dict"])


@pytest.mark.parametrize("options", [CUBIC, RAMP], ids=lambda options: options["mode"])
def test_a_module_with_two_optimizers_of_its_own(options: Any, tmp_path: Path) -> None:
    made = TwoPlayers()
    schedule = SparsitySchedule("*.weight", **options)
    rows = DataLoader([toy_tensors(16, seed) for seed in range(6)], batch_size=None)
    final = run(made, schedule, keep(tmp_path), data=rows)
    for name in ("first.weight", "second.weight"):
        assert 0 < int((final[name] == 0).sum()) < 18
    restored = TwoPlayers()
    again = [SparsitySchedule("*.weight", **options), keep(tmp_path / "again")]
    resumed = run(restored, *again, ckpt=tmp_path / "epoch=1.ckpt", data=rows)
    assert same(resumed, final)


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of `sparsity_script` left behind."""
    if sys.platform == "win32" or not torch.distributed.is_gloo_available():
        pytest.skip("needs fork and gloo")
    tests, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("sparse")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, str(tests / "sparsity_script.py"), str(folder), *SCHEDULES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_processes_find_the_zeros_of_one(name: str, runs: Path) -> None:
    [one, *two] = (
        torch.load(runs / f"{name} {processes}" / f"rank {rank}.pt", weights_only=True)
        for processes, rank in ((1, 0), (2, 0), (2, 1))
    )
    zeros = sum(int((weight == 0).sum()) for key, weight in one["weights"].items() if key.endswith("weight"))
    assert zeros > 0
    for found in two:
        assert found["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            assert torch.equal(found["weights"][key] == 0, weight == 0), key
            torch.testing.assert_close(found["weights"][key], weight, rtol=1e-4, atol=1e-5)
        logged = {key: value for key, value in one["logged"].items() if "sparsity" in key}
        assert logged
        assert {key: found["logged"][key] for key in logged} == pytest.approx(logged)


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_processes_log_without_a_warning(name: str, runs: Path) -> None:
    for rank in (0, 1):
        warned = torch.load(runs / f"{name} 2" / f"rank {rank}.pt", weights_only=True)["warned"]
        assert [text for text in warned if "sync_dist" in text] == []


# ---------------------------------------------------------------- bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"strength": -1.0}, "strength: expected a number of at least 0"),
    ({"strength": float("nan")}, "strength: .* got nan"),
    ({"mode": "adaptive", "target_nec": 2, "strength": 0.0}, r"strength: .*\(above 0 to adapt it\), got 0.0"),
    ({"begin": 0.6, "end": 0.5}, "begin, end: .* got 0.6 and 0.5"),
    ({"begin": -0.1}, "begin, end:"),
    ({"mode": "square"}, "mode: expected one of .*'adaptive'.*got 'square'"),
    ({"penalty": "l2"}, "penalty: expected one of .*'group'.*got 'l2'"),
    ({"alpha": 1.5}, "alpha: .* got 1.5"),
    ({"mode": "adaptive"}, "target_nec: mode 'adaptive' needs a number of effective concepts"),
    ({"mode": "cubic"}, "target_nec: mode 'cubic' needs"),
    ({"mode": "cubic", "target_nec": 0}, "target_nec: expected a positive number of effective concepts, got 0"),
    ({"mode": "linear", "target_nec": 2}, "target_nec: mode 'linear' prunes to it when finetune begins"),
    ({"end": 0.7, "finetune": 0.4}, r"finetune: expected a share in \[0, 0.3\], after the ramp, got 0.4"),
    ({"finetune": -0.1}, "finetune:"),
    ({"every_n_steps": 0}, "every_n_steps: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_options_that_do_not_fit(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(**options)


SETUP: list[tuple[dict[str, Any], str]] = [
    ({"parameters": "head.weights"}, r"nothing matches 'head.weights'; the parameters are .*'head.linear.weight'"),
    ({"parameters": [HEAD, "nothing.*"]}, "nothing matches 'nothing.*'"),
    ({"mode": "cubic", "target_nec": 5}, "target_nec: head.linear.weight has 4 concepts a row, got 5"),
    ({"mode": "cubic", "target_nec": 1, "parameters": "head.linear.bias"}, r"expected weights \[rows, columns\]"),
    ({"penalty": "group", "group_dim": 2}, r"group_dim: head.linear.weight has the shape \[3, 4\], got 2"),
]


@pytest.mark.parametrize(("options", "message"), SETUP, ids=[message[:40] for _, message in SETUP])
def test_what_does_not_fit_the_model_is_said_before_anything_trains(options: Any, message: str) -> None:
    made, seen = model(), Recorder()
    before = states(made)
    with pytest.raises(ValueError, match=message):
        run(made, SparsitySchedule(**options), seen)
    assert not seen.weights
    assert same(states(made), before)


class Stream(IterableDataset):
    """Samples without a number."""

    def __iter__(self):
        rows = toy_tensors(32)
        return ({name: column[i] for name, column in rows.items()} for i in range(32))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("length", [True, False])
def test_a_training_without_an_end_has_no_shares(length: bool) -> None:
    data = ToyData() if length else DataLoader(Stream(), 16)
    options = {"max_epochs": -1 if length else EPOCHS}
    with pytest.raises(ValueError, match="shares of the training need max_epochs or max_steps"):
        run(model(), SparsitySchedule(**RAMP), data=data, **options)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_steps_are_an_end_too() -> None:
    for data in (ToyData(), DataLoader(Stream(), 16)):
        options = {"max_epochs": -1, "max_steps": 10}
        final = run(model(), SparsitySchedule(**CUBIC), data=data, **options)
        assert int((final[HEAD] != 0).sum()) == 4
