from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging
from resume_script import EPOCHS, KILLS, Kill, make_run
from torch import Tensor

from cbm_lightning import Phase
from cbm_lightning.randomness import restore_rng_state, rng_state, step_generator

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills forked processes")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed runs: sums depend on the number of threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the killed runs left behind."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "resume_script.py"), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The final weights of each kind of run."""
    folder = tmp_path_factory.mktemp("whole")
    final = {}
    for kind in {kill.kind for kill in KILLS}:
        trainer, model, data = make_run(kind, folder / kind)
        trainer.fit(model, data)
        final[kind] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return final


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the killed run's own
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.folder)
def test_a_killed_run_resumes_to_the_same_weights(kill: Kill, killed: Path, uninterrupted) -> None:
    written = sorted((killed / kill.folder).glob("*.ckpt"))
    assert [path.name for path in written] == [f"epoch={epoch}.ckpt" for epoch in range(kill.epoch)]
    trainer, model, data = make_run(kill.kind, killed / kill.folder)
    torch.manual_seed(99)  # nothing may depend on what was drawn before the resume
    trainer.fit(model, data, ckpt_path=written[-1], weights_only=True)
    assert trainer.current_epoch == EPOCHS
    expected = uninterrupted[kill.kind]
    state = model.state_dict()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not different


class Recorder(Callback):
    """Keeps the phase of each epoch and the learning rates of each step."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer, model, batch, batch_idx) -> None:
        if batch_idx == 0 or not self.phases:
            self.phases.append(model.phase.name)
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def run(folder: Path, ckpt: Path | None = None, **options: Any) -> tuple[dict[str, Tensor], Recorder]:
    """Final weights of a run, or of the rest of one, and the weights after each of its epochs."""
    recorder = Recorder()
    callbacks = [callback() for callback in options.pop("make_callbacks", [])]
    trainer, model, data = make_run("embedding", folder, callbacks=[*callbacks, recorder], **options)
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, recorder


VARIANTS: dict[str, dict[str, Any]] = {
    "no validation": {"limit_val_batches": 0},
    "saved when the training epoch ends": {"keep": {"save_on_train_epoch_end": True}},
    "accumulated": {"accumulate_grad_batches": 3},
    "averaged": {"make_callbacks": [lambda: EMAWeightAveraging(decay=0.8)]},
    "every second epoch validated": {"check_val_every_n_epoch": 2, "keep": {"save_on_train_epoch_end": True}},
    "finetuned": {
        "make_callbacks": [lambda: BackboneFinetuning(1, lambda_func=lambda epoch: 1.2, train_bn=False)],
        "phases": [Phase("a", epochs=4), Phase("b", train=["bottleneck", "head"], epochs=2)],
        "lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.9}},
    },
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_epoch_end_is_a_place_to_go_on_from(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    whole, seen = run(tmp_path / "whole", **options)
    for epoch in (1, 2, 3):
        resumed, again = run(tmp_path / f"from {epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt", **options)
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
        assert again.phases == seen.phases[epoch + 1 :]
        assert again.rates == seen.rates[-len(again.rates) :]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_in_the_middle_of_an_epoch_resumes_in_its_phase(tmp_path: Path) -> None:
    keep = {"every_n_train_steps": 1, "filename": "{step}"}
    run(tmp_path / "whole", keep=keep)
    # four steps an epoch, three epochs a phase: step 14 is the second of the second phase
    weights = torch.load(tmp_path / "whole" / "step=14.ckpt", weights_only=True)["state_dict"]
    resumed, seen = run(tmp_path / "rest", tmp_path / "whole" / "step=14.ckpt", keep=keep)
    assert set(seen.phases) == {"labels"}
    moved = {name.split(".")[0] for name in weights if not torch.equal(weights[name], resumed[name])}
    assert moved == {"head"}


def test_the_states_of_three_generators_come_back() -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(()).item()  # noqa: NPY002

    random.gauss(0, 1)  # leaves a second number behind, and numpy does the same
    np.random.normal()  # noqa: NPY002
    state = rng_state()
    first = [draw() for _ in range(3)]
    restore_rng_state(state)
    assert [draw() for _ in range(3)] == first


def test_draws_of_a_step_depend_on_every_number_and_on_nothing_else() -> None:
    before = torch.get_rng_state()
    drawn = {
        n: torch.rand(2, generator=step_generator(*n)).tolist() for n in [(0, 1, 0), (0, 0, 1), (1, 0, 0), (-1, 0)]
    }
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4
    assert torch.rand(2, generator=step_generator(0, 0, 1)).tolist() == drawn[0, 0, 1]
    assert torch.equal(before, torch.get_rng_state())
