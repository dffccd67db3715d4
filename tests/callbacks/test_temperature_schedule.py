"""Temperatures epoch by epoch and step by step: beside SCBM's, and again after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Log, make
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli
from torch.utils.data import DataLoader, IterableDataset
from toy import CLASSES, ToyData, quiet_trainer

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.bottlenecks.scalar import ScalarBottleneck
from cbm_lightning.callbacks import TemperatureSchedule
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention


class Relaxed(LightningModule):
    """A user's own module, which notes what each of its training steps reads."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(1, 1)
        for name, buffer in (buffers or {"temperature": torch.tensor(7.0)}).items():
            self.bottleneck.register_buffer(name, buffer)
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        temperature = dict(self.bottleneck.named_buffers()).get("temperature", torch.ones(()))
        self.seen.append((self.current_epoch, self.global_step, float(temperature)))
        return (self.bottleneck(batch) / temperature).sigmoid().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    schedule: TemperatureSchedule, epochs: int = 1, batches: int = 1, model: Relaxed | None = None, **options: Any
) -> Relaxed:
    model = Relaxed() if model is None else model
    fit_options = {"ckpt_path": path, "weights_only": True} if (path := options.pop("ckpt_path", None)) else {}
    others = options.pop("callbacks", [])
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[schedule, *others], **options)
    trainer.fit(model, DataLoader(torch.ones(batches, 1)), **fit_options)
    return model


def by_epoch(model: Relaxed) -> list[float]:
    return list({epoch: temperature for epoch, _, temperature in model.seen}.values())


# ---------------------------------------------------------------- the official temperatures


@pytest.mark.parametrize("epochs", [100, 300])
def test_the_defaults_are_the_official_temperatures(shared: Path, epochs: int) -> None:
    name = f"gumbel_temperature_{epochs}epochs"
    with np.load(shared / "golden" / "dev" / "calibration_and_temperature.npz", allow_pickle=False) as found:
        official = torch.from_numpy(found[name])
    schedule = TemperatureSchedule()
    ours = [schedule.temperature_at(epoch / epochs) for epoch in range(len(official))]
    # theirs are computed in single precision
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), official, rtol=2e-7, atol=0)
    assert len(official) > epochs, "the fixture goes on after the last epoch"
    trained = by_epoch(fit(schedule, epochs))
    assert len(trained) == epochs
    torch.testing.assert_close(torch.tensor(trained), official[:epochs].float(), rtol=2e-7, atol=0)


# ---------------------------------------------------------------- shapes

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 0.5,
    "linear": lambda way: 2.0 - 1.5 * way,
    "cosine": lambda way: 1.25 + 0.75 * math.cos(math.pi * way),
    "cubic": lambda way: 0.5 + 1.5 * (1 - way) ** 3,
    "exponential": lambda way: 2.0 * 0.25**way,
}


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("mode", SHAPES)
def test_warm_up_ramp_and_hold(mode: Any, interval: Any) -> None:
    schedule = TemperatureSchedule(first=2.0, last=0.5, mode=mode, begin=0.25, end=0.75, interval=interval)
    # eight places either way
    epochs, batches = (8, 2) if interval == "epoch" else (4, 2)
    model = fit(schedule, epochs, batches)
    found = by_epoch(model) if interval == "epoch" else [temperature for _, _, temperature in model.seen]
    ramp = [SHAPES[mode](way) for way in (0, 0.25, 0.5, 0.75)]
    assert found == pytest.approx([2.0, 2.0, *ramp, 0.5, 0.5])


def test_temperatures_may_rise() -> None:
    assert by_epoch(fit(TemperatureSchedule(first=0.5, last=1.5, mode="linear"), 4)) == pytest.approx(
        [0.5, 0.75, 1.0, 1.25]
    )


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(("batches", "accumulate", "steps"), [(6, 1, 6), (6, 3, 2), (7, 3, 3)])
def test_steps_are_those_of_the_optimizer(batches: int, accumulate: int, steps: int) -> None:
    schedule = TemperatureSchedule(first=4.0, last=1.0, mode="linear", interval="step")
    model = fit(schedule, 4, batches, accumulate_grad_batches=accumulate)
    assert [step for _, step, _ in model.seen] == [
        epoch * steps + batch // accumulate for epoch in range(4) for batch in range(batches)
    ]
    assert [found for _, _, found in model.seen] == pytest.approx(
        [4.0 - 3.0 * step / (4 * steps) for _, step, _ in model.seen]
    )


def test_steps_of_a_training_that_max_steps_ends() -> None:
    schedule = TemperatureSchedule(first=4.0, last=1.0, mode="linear", interval="step")
    model = fit(schedule, -1, 4, max_steps=6)
    assert [found for _, _, found in model.seen] == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0, 1.5])


# ---------------------------------------------------------------- checkpoints


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("every", [3, 6], ids=["in an epoch", "after an epoch"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_resumed_run_reads_the_same_temperatures(tmp_path: Path, interval: Any, every: int) -> None:
    def run(*callbacks: ModelCheckpoint, **more: Any) -> Relaxed:
        # six steps an epoch
        options = {"accumulate_grad_batches": 2, "callbacks": callbacks, "enable_checkpointing": bool(callbacks)}
        return fit(TemperatureSchedule(interval=interval), 5, 12, **options, **more)

    whole = run(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every))
    for step in (every, 3 * every):
        checkpoint = tmp_path / f"step={step}.ckpt"
        written = torch.load(checkpoint, weights_only=True)["state_dict"]["bottleneck.temperature"]
        assert float(written) in [found for _, at, found in whole.seen if at == step - 1]
        resumed = run(ckpt_path=checkpoint)
        assert resumed.seen == [row for row in whole.seen if row[1] >= step]
    assert len({found for _, _, found in whole.seen}) == (5 if interval == "epoch" else 30)


def test_a_restored_model_has_the_last_temperature(tmp_path: Path) -> None:
    model = make(LinearBottleneck(gates=True))
    trainer = quiet_trainer(max_epochs=4, limit_train_batches=1, callbacks=[TemperatureSchedule(first=2.0)])
    trainer.fit(model, ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # the backbone is a test's own, so that the checkpoint cannot make it
    restored = CBMModule.load_from_checkpoint(tmp_path / "last.ckpt", backbone=make().backbone)
    assert float(restored.bottleneck.gates.temperature) == pytest.approx(2.0 * 0.25**0.75)


# ---------------------------------------------------------------- bottlenecks


class Gumbel(ScalarBottleneck):
    """A user's bottleneck whose head reads relaxed draws in training."""

    temperature: Tensor

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        self.build_values(concepts)
        self.scores = nn.Linear(dims.pooled, len(concepts))
        self.register_buffer("temperature", torch.tensor(9.0))
        self.seen: list[float] = []

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        output = self.make_output(features, self.scores(features.pooled))
        if not self.training:
            return output
        self.seen.append(float(self.temperature))
        return output.replace(values=RelaxedBernoulli(self.temperature, logits=output.logits).rsample())

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        return super().intervene(output, intervention)


def train(bottleneck: Bottleneck, *schedules: TemperatureSchedule, log: Log | None = None, **options: Any) -> Trainer:
    model = make(bottleneck, num_classes=CLASSES)
    logger = {"logger": log} if log is not None else {}
    trainer = quiet_trainer(max_epochs=4, limit_train_batches=2, callbacks=list(schedules), **logger, **options)
    trainer.fit(model, ToyData())
    return trainer


def test_a_bottleneck_of_the_users_own_is_annealed_and_logged() -> None:
    log, bottleneck = Log(), Gumbel()
    train(bottleneck, TemperatureSchedule(), log=log)
    expected = [0.5 ** (epoch / 4) for epoch in range(4)]
    assert bottleneck.seen == pytest.approx([x for x in expected for _ in range(2)])
    assert [row["train/temperature"] for row in log.rows if "train/temperature" in row] == pytest.approx(expected)


def test_gates_are_annealed_and_their_penalty_knows() -> None:
    bottleneck = LinearBottleneck(gates=True)
    schedule = TemperatureSchedule("*gates.temperature", first=2.0, last=0.25, mode="linear", interval="step")
    trainer = train(bottleneck, schedule)
    temperature = bottleneck.gates.temperature
    # eight steps, and the last begins at 7/8 of the way
    assert float(temperature) == pytest.approx(2.0 - 1.75 * 7 / 8)
    assert float(trainer.callback_metrics["train/temperature"]) == float(temperature)
    expected = (bottleneck.gates.log_alpha.detach() - temperature * math.log(0.1 / 1.1)).sigmoid().mean()
    assert float(trainer.callback_metrics["val/loss_l0"]) == pytest.approx(float(expected))


def test_patterns_choose_the_buffers() -> None:
    names = ["temperature", "gate_temperature", "tau", "temperatures_known"]
    model = Relaxed(**{name: torch.tensor(9.0) for name in names})
    schedule = TemperatureSchedule(["bottleneck.*temperature", "bottleneck.tau"], first=3.0, last=3.0)
    fit(schedule, model=model)
    assert {name: float(buffer) for name, buffer in model.bottleneck.named_buffers()} == {
        "temperature": 3.0,
        "gate_temperature": 3.0,
        "tau": 3.0,
        "temperatures_known": 9.0,
    }


@pytest.mark.parametrize("buffer", [torch.ones(1), torch.ones((), dtype=torch.float64), torch.ones(1, 1).half()])
def test_any_single_floating_point_number_will_do(buffer: Tensor) -> None:
    model = fit(TemperatureSchedule(first=0.25, last=0.25), model=Relaxed(temperature=buffer.clone()))
    assert torch.equal(model.bottleneck.temperature, torch.full_like(buffer, 0.25))


# ---------------------------------------------------------------- bad input


def test_a_pattern_without_a_buffer_lists_the_buffers() -> None:
    model = Relaxed(tau=torch.tensor(1.0), size=torch.ones(3))
    message = r"^buffers: nothing matches 'bottleneck.\*temperature'; the buffers are \['bottleneck.tau', 'bottleneck.s"
    with pytest.raises(ValueError, match=message):
        fit(TemperatureSchedule(), model=model)
    with pytest.raises(ValueError, match=r"nothing matches 'head.\*'"):
        fit(TemperatureSchedule(["bottleneck.tau", "head.*"]), model=model)
    assert model.seen == []


@pytest.mark.parametrize("buffer", [torch.ones(2), torch.ones(()).long(), torch.ones(0)])
def test_what_is_no_temperature(buffer: Tensor) -> None:
    model = Relaxed(tau=torch.tensor(1.0), temperatures=buffer)
    message = r"^buffers: expected single floating-point numbers, \['bottleneck.temperatures'\] are none"
    with pytest.raises(ValueError, match=message):
        fit(TemperatureSchedule("bottleneck.t*"), model=model)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.ones(3, 1)


def test_a_training_without_an_end() -> None:
    by_step = TemperatureSchedule(interval="step")
    with pytest.raises(ValueError, match="^TemperatureSchedule: shares of the training need max_epochs in the Trainer"):
        fit(TemperatureSchedule(), -1, max_steps=3)
    with pytest.raises(ValueError, match="^TemperatureSchedule: .* need max_epochs or max_steps in the Trainer"):
        fit(by_step, -1, max_time={"minutes": 5})
    # nobody knows how many steps an epoch has
    model, trainer = Relaxed(), quiet_trainer(max_epochs=2, callbacks=[by_step])
    with pytest.raises(ValueError, match="^TemperatureSchedule: .* need max_epochs or max_steps"):
        trainer.fit(model, DataLoader(Endless()))
    quiet_trainer(max_epochs=2, callbacks=[TemperatureSchedule()]).fit(model, DataLoader(Endless()))
    assert by_epoch(model) == pytest.approx([1.0, 0.5**0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffers": []}, "buffers: "),
        ({"first": 0.0}, "first: expected a positive temperature, got 0.0"),
        ({"last": -0.5}, "last: expected a positive temperature, got -0.5"),
        ({"first": math.inf}, "first: .* got inf"),
        ({"last": math.nan}, "last: .* got nan"),
        ({"mode": "square"}, "mode: expected one of .*, got 'square'"),
        ({"begin": 0.6, "end": 0.4}, "begin, end: .* got 0.6 and 0.4"),
        ({"end": 1.5}, "begin, end: .* got 0.0 and 1.5"),
        ({"interval": "batch"}, "interval: expected one of .*, got 'batch'"),
    ],
)
def test_bad_options_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TemperatureSchedule(**options)


def test_evaluation_asks_for_no_buffer() -> None:
    model = make()
    trainer = quiet_trainer(callbacks=[TemperatureSchedule()])
    assert "test/label_acc" in trainer.test(model, ToyData(), verbose=False)[0]
    with pytest.raises(ValueError, match="^buffers: nothing matches"):
        trainer.fit(model, ToyData())
