"""Runs with a phase that a solver takes: checkpoints, resumes, processes, the command line, and what cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, make, same, states
from sklearn.linear_model import LogisticRegression
from sparsity_script import SOLVERS
from torch import Tensor
from toy import CONCEPTS, ToyData, quiet_trainer

from cbm_lightning import CBMModule, LinearBottleneck, LinearHead, MLPHead, Phase, ResidualHead
from cbm_lightning.cli import main
from cbm_lightning.phases import make_phases
from cbm_lightning.sparsity import ElasticNetPath

HEAD = "head.linear.weight"
LOGISTIC = "sklearn.linear_model.LogisticRegression"
PATH = {"class_path": "ElasticNetPath", "init_args": {"nec": 2}}

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def model(solver: Any = PATH, epochs: int = 2, **options: Any) -> CBMModule:
    phases = [Phase("joint", epochs=epochs), Phase("sparse_head", train=["head"], solver=solver)]
    return make(LinearBottleneck("logits", randint=0.3), **{"phases": phases, "lr": 0.05, **options})


def run(made: CBMModule, *callbacks: Callback, ckpt: Path | None = None, data: Any = None, **options: Any) -> Any:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": list(callbacks), "enable_checkpointing": saves, **options})
    trainer.fit(made, data or ToyData(), ckpt_path=ckpt, weights_only=True)
    return trainer


def keep(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, **options})


# ---------------------------------------------------------------- checkpoints and resumes


@pytest.mark.parametrize(
    "solver",
    [
        PATH,
        "ElasticNetPath",
        ElasticNetPath(lambdas=[0.1, 0.01]),
        ElasticNetPath(lambdas=np.array([0.1, 0.01])),
        ElasticNetPath(lambdas=np.float64(0.01)),
        {"class_path": LOGISTIC, "init_args": {"C": 0.5}},
        LogisticRegression(C=0.5),
    ],
    ids=["spec", "name", "list", "array", "number", "sklearn spec", "sklearn"],
)
def test_a_checkpoint_needs_nothing_else(solver: Any, tmp_path: Path) -> None:
    made = model(solver, epochs=1)
    run(made, keep(tmp_path), max_epochs=2)
    loaded = CBMModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert same(states(loaded), states(made))
    assert [phase.to_dict() for phase in loaded.phases] == [phase.to_dict() for phase in made.phases]
    assert loaded.phases[1].solver["class_path"].endswith(("ElasticNetPath", "LogisticRegression"))


def test_a_phase_survives_its_plain_form() -> None:
    for solver in (PATH, "ElasticNetPath", ElasticNetPath(nec=3, family="ovr"), {"class_path": LOGISTIC}):
        phase = Phase("p", train=["head"], solver=solver)
        assert phase.epochs == 1
        assert make_phases([phase.to_dict()]) == [phase]
        assert yaml.safe_load(yaml.safe_dump(phase.to_dict())) == phase.to_dict()


def test_options_of_an_estimator_are_those_that_were_given() -> None:
    given = LogisticRegression(C=0.5, max_iter=7, class_weight={0: 2.0, 1: 1.0}, solver="saga")
    kept = Phase("p", train=["head"], solver=given).solver["init_args"]
    assert {name: kept[name] for name in ("C", "max_iter", "class_weight", "solver")} == {
        "C": 0.5,
        "max_iter": 7,
        "class_weight": {0: 2.0, 1: 1.0},
        "solver": "saga",
    }


class Ridge(LogisticRegression):
    """An estimator whose None is not its default."""

    def __init__(self, floor: float | None = 0.5, C: float = 1.0) -> None:
        super().__init__(C=C)
        self.floor = floor


def test_none_is_an_option_too() -> None:
    assert Phase("p", train=["head"], solver=Ridge(floor=None)).solver["init_args"].get("floor", "gone") is None


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_ends_with_the_weights_of_the_whole(epoch: int, tmp_path: Path) -> None:
    whole, seen = model(), Recorder()
    run(whole, keep(tmp_path / "whole"))
    resumed = model()
    torch.manual_seed(5)
    run(resumed, keep(tmp_path / "rest"), seen, ckpt=tmp_path / "whole" / f"epoch={epoch}.ckpt")
    assert seen.phases == ["joint", "sparse_head"][epoch:]
    assert same(states(whole), states(resumed))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_cannot_go_on_in_the_middle_of_the_solvers_epoch(tmp_path: Path) -> None:
    steps = {"every_n_train_steps": 1, "filename": "{step}"}
    run(model(), keep(tmp_path / "whole", **steps))
    made = model()
    with pytest.raises(ValueError, match="cannot be resumed at batch 3 of its epoch.*the epoch before"):
        run(made, keep(tmp_path / "rest", **steps), ckpt=tmp_path / "whole" / "step=15.ckpt")


def test_a_second_fit_is_like_the_first() -> None:
    phases = [Phase("joint", epochs=1), Phase("sparse_head", train=["head"], solver=PATH)]
    heads = []
    for _ in range(2):
        made = make(LinearBottleneck("logits"), phases=phases, lr=0.05)
        run(made, max_epochs=2)
        heads.append(made.head.linear.weight.detach().clone())
    assert torch.equal(*heads)
    # and the model can train once more, everything free again
    assert all(parameter.requires_grad for parameter in made.parameters())
    run(made, max_epochs=2)


def test_one_batch_of_everything_runs_through() -> None:
    run(model(), fast_dev_run=True)


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of `sparsity_script` left behind."""
    if sys.platform == "win32" or not torch.distributed.is_gloo_available():
        pytest.skip("needs fork and gloo")
    tests, folder = Path(__file__).parent, tmp_path_factory.mktemp("solved")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, str(tests / "sparsity_script.py"), str(folder), *SOLVERS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", SOLVERS)
def test_two_processes_fit_the_head_of_one(name: str, runs: Path) -> None:
    failed = [path.read_text()[-500:] for path in runs.glob(f"{name} *.txt")]
    assert failed == []
    one, first, second = (
        torch.load(runs / f"{name} {processes}" / f"rank {rank}.pt", weights_only=True)
        for processes, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert same(first["weights"], second["weights"])
    for key, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(first["weights"][HEAD] == 0, one["weights"][HEAD] == 0)
    assert first["logged"]["val/label_acc"] == pytest.approx(one["logged"]["val/label_acc"])


# ---------------------------------------------------------------- the command line

CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false}
model:
  class_path: CBMModule
  init_args:
    backbone: {class_path: toy.ToyBackbone, init_args: {width: 8}}
    phases: [{name: joint, epochs: 1}, {name: sparse_head, train: [head], solver: SOLVER}]
data: {class_path: toy.ToyData}
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a configuration with a solver; its flags."""
    import toy  # noqa: F401  the CLI finds classes that are imported, or importable by path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])

    def write(solver: str) -> list[str]:
        (tmp_path / "sparse.yaml").write_text(CONFIG.replace("SOLVER", solver))
        return ["--config", "sparse.yaml"]

    return write


@pytest.mark.filterwarnings("ignore:The `.*` does not have many workers")
@pytest.mark.parametrize(
    ("solver", "zeros"),
    [
        ("{class_path: cbm_lightning.sparsity.ElasticNetPath, init_args: {nec: 2}}", 6),
        ("ElasticNetPath", None),
        (f"{{class_path: {LOGISTIC}, init_args: {{C: 0.5}}}}", 0),
        (LOGISTIC, 0),
    ],
)
def test_a_solver_in_yaml(solver: str, zeros: int | None, configured: Any, tmp_path: Path) -> None:
    flags = configured(solver)
    cli = main(["fit", *flags])
    head = cli.model.head.linear.weight
    assert zeros is None or int((head == 0).sum()) == zeros
    score = cli.trainer.callback_metrics["test/label_acc"]
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.equal(CBMModule.load_from_checkpoint(checkpoint).head.linear.weight, head)
    # the resolved configuration is one too, and so are the hyper-parameters of the checkpoint
    tested = main(["test", "--config", "config.yaml", "--ckpt_path", str(checkpoint)])
    assert tested.trainer.callback_metrics["test/label_acc"] == score
    names = [run.model.phases[1].solver["class_path"].rpartition(".")[2] for run in (cli, tested)]
    assert names == [solver.partition(",")[0].rpartition(" ")[2].rpartition(".")[2]] * 2


@pytest.mark.parametrize("name", ["ElasticNetPath", "cbm_lightning.sparsity.ElasticNetPath"])
def test_the_same_names_in_python(name: str) -> None:
    solver = Phase("p", train=["head"], solver={"class_path": name, "init_args": {"nec": 2}}).solver
    assert solver["init_args"] == {"nec": 2}
    assert Phase("p", train=["head"], solver=name).epochs == 1


# ---------------------------------------------------------------- what cannot work

BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": ["bottleneck", "head"]}, r"phase 'p': train: a solver fits \['head'\], got \['bottleneck', 'head'\]"),
    ({"train": ["head"], "epochs": 3}, "phase 'p': a solver takes one epoch and no learning rate, got {'epochs': 3}"),
    ({"train": ["head"], "lr": 0.1}, "phase 'p': a solver takes one epoch and no learning rate, got {'lr': 0.1}"),
    ({"solver": "ElasticNetPth"}, "solver: no BaseEstimator is called 'ElasticNetPth'; near matches .*ElasticNetPath"),
    ({"solver": "torch.nn.Linear"}, "solver: no BaseEstimator is called 'torch.nn.Linear'"),
    ({"solver": "nowhere.Estimator"}, "solver: cannot import 'nowhere.Estimator'"),
    ({"solver": {**PATH, "args": 1}}, r"solver: expected the keys class_path and init_args, got also \['args'\]"),
    ({"solver": {**PATH, "init_args": {"nce": 2}}}, r"solver: ElasticNetPath takes .*, not \['nce'\]"),
    ({"solver": {**PATH, "init_args": {"nec": -1}}}, "nec: expected positive numbers of effective concepts, got -1"),
    ({"solver": {"class_path": LOGISTIC, "init_args": {"c": 1}}}, r"LogisticRegression takes .*, not \['c'\]"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_phases_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase("p", **{"train": ["head"], "solver": PATH, **options})


def several() -> ToyData:
    class Several(ToyData):
        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            return {**rows, "label": torch.nn.functional.one_hot(rows["label"], 3)}

        def annotations(self, split: str) -> tuple[Tensor, Tensor]:
            raise KeyError(split)

    return Several()


UNFIT: dict[str, tuple[Any, Any, str]] = {
    "mlp": (lambda: model(head=MLPHead([4])), ToyData, "solver: a linear classifier cannot become a MLPHead"),
    "residual": (lambda: model(head=ResidualHead()), ToyData, "solver: .* cannot become a ResidualHead"),
    "no bias": (
        lambda: model(head=LinearHead(bias=False)),
        ToyData,
        "solver: the head has no bias, but the solver fits one; give it fit_intercept: false",
    ),
    "too many": (
        lambda: model({**PATH, "init_args": {"nec": CONCEPTS + 1}}),
        ToyData,
        "nec: expected at most the 4 concepts",
    ),
    "softmax of several labels": (lambda: model(task="multilabel"), several, "several labels .*need family='ovr'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_work_is_said_before_anything_trains(name: str) -> None:
    make_model, make_data, message = UNFIT[name]
    made, seen = make_model(), Recorder()
    with pytest.raises(ValueError, match=message):
        run(made, seen, data=make_data())
    assert seen.weights == []
