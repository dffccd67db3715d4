"""A phase whose head an estimator fits: its weights beside those fitted by hand on the values of the training split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from recorder import Recorder, make, part_of, same
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from toy import CONCEPTS, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, LinearHead, Phase
from cbm_lightning.callbacks import SparsitySchedule
from cbm_lightning.sparsity import ElasticNetPath

HEAD = "head.linear.weight"
LOGISTIC = "sklearn.linear_model.LogisticRegression"
EXACT: dict[str, Any] = {"dtype": "float64", "tol": 1e-8}

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def spec(path: str = "ElasticNetPath", **options: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": options}


PATH = spec(nec=2, **EXACT)


def phases(solver: Any = PATH, epochs: int = 2, **options: Any) -> list[Phase]:
    joint = [Phase("joint", epochs=epochs)] if epochs else []
    return [*joint, Phase("sparse_head", train=["head"], solver=solver, **options)]


def model(bottleneck: Any = None, solver: Any = PATH, epochs: int = 2, **options: Any) -> CBMModule:
    head_input = options.pop("head_input", "predicted")
    options = {"lr": 0.05, "phases": phases(solver, epochs, head_input=head_input), **options}
    return make(LinearBottleneck("logits") if bottleneck is None else bottleneck, **options)


def fit(made: LightningModule, data: Any = None, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> Any:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": list(callbacks), "enable_checkpointing": saves, **options})
    torch.manual_seed(1)
    trainer.fit(made, ToyData() if data is None else data, ckpt_path=ckpt, weights_only=True)
    return trainer


def values(made: CBMModule, rows: dict[str, Tensor]) -> Tensor:
    """What the head reads of samples, the rest of the model as it is now."""
    with torch.no_grad():
        return made.eval().bottleneck(made.encode({"image": rows["image"]})).values


def close(made: CBMModule, coef: Any, intercept: Any, **tolerance: float) -> None:
    tolerance = {"rtol": 1e-3, "atol": 1e-4, **tolerance}
    head = made.head.linear
    torch.testing.assert_close(head.weight.detach(), torch.as_tensor(coef).float(), **tolerance)
    torch.testing.assert_close(head.bias.detach(), torch.as_tensor(intercept).float(), **tolerance)


class Labelled(ToyData):
    """The toy data with labels of another kind, none of which `annotations` knows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @property
    def class_names(self) -> list[str]:
        return super().class_names[: 3 if self.kind in ("several", "unseen") else 2]

    def tensors(self, name: str) -> dict[str, Tensor]:
        rows = super().tensors(name)
        match self.kind:
            case "several":
                rows["label"] = torch.stack(
                    [rows["label"] == 1, rows["concepts"][:, 0] > 0, rows["image"][:, 1] > 0], 1
                )
            case "unseen":
                rows["label"] = torch.where(rows["label"] == 1, 2, rows["label"])
            case _:
                rows["label"] = (rows["label"] > 0).long()
        return {**rows, "label": rows["label"].long()}

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        raise KeyError(split)


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize(
    "solver",
    [
        PATH,
        spec("cbm_lightning.sparsity.elastic_net_path.ElasticNetPath", lambdas=[0.3, 0.15], penalty="group", **EXACT),
        ElasticNetPath(nec=1.5, refit_ridge=1e-3, family="ovr", dtype="float64", tol=1e-8),
        spec(LOGISTIC, C=0.3, tol=1e-8),
        LogisticRegression(C=2.0, tol=1e-8),
    ],
    ids=["nec", "group", "refit", "logistic", "instance"],
)
def test_the_head_is_the_one_fitted_by_hand(solver: Any, epochs: int) -> None:
    made, rows = model(solver=solver, epochs=epochs), toy_tensors(96)
    trainer = fit(made, max_epochs=epochs + 1)
    x, y = values(made, rows).numpy(), rows["label"].numpy()
    if isinstance(solver, dict):
        kind = LogisticRegression if solver["class_path"] == LOGISTIC else ElasticNetPath
        solver = kind(**solver["init_args"])
    expected = solver.fit(x, y)
    dense = isinstance(expected, LogisticRegression)
    close(made, expected.coef_, expected.intercept_, **({"rtol": 1e-2, "atol": 1e-2} if dense else {}))
    zero = made.head.linear.weight == 0
    assert torch.equal(zero, torch.as_tensor(expected.coef_ == 0))
    assert dense == (int(zero.sum()) == 0)
    # and it is the one that validation judged
    rows = toy_tensors(41, 1)
    logits = torch.from_numpy(np.asarray(expected.decision_function(values(made, rows).numpy())))
    accuracy = float((logits.argmax(1) == rows["label"]).float().mean())
    assert float(trainer.callback_metrics["val/label_acc"]) == pytest.approx(accuracy)


def test_the_head_input_of_independent_training() -> None:
    solver = spec(lambdas=0.02, **EXACT)
    made = model(LinearBottleneck("sigmoid"), solver, head_input="true")
    fit(made)
    rows = toy_tensors(96)
    expected = ElasticNetPath(lambdas=0.02, **EXACT).fit(rows["concepts"], rows["label"])
    close(made, expected.coef_, expected.intercept_)


@pytest.mark.parametrize("options", [{"nec": 2}, {"lambdas": 0.1, "penalty": "group"}], ids=["nec", "group"])
def test_an_embedding_is_one_concept(options: dict[str, Any]) -> None:
    made, rows = model(EmbeddingBottleneck(3, randint=0.0), spec(**options, **EXACT)), toy_tensors(96)
    fit(made)
    expected = ElasticNetPath(group_size=3, **options, **EXACT).fit(values(made, rows), rows["label"])
    close(made, expected.coef_, expected.intercept_)
    blocks = made.head.linear.weight.view(3, CONCEPTS, 3) != 0
    if "nec" in options:
        assert int(blocks.any(2).sum()) == 6
    else:
        assert set(blocks.sum((0, 2)).tolist()) == {0, 9}


def test_free_dimensions_are_columns_like_others() -> None:
    made, rows = model(LinearBottleneck("logits", extra_dims=2), spec(lambdas=0.03, **EXACT)), toy_tensors(96)
    fit(made)
    expected = ElasticNetPath(lambdas=0.03, **EXACT).fit(values(made, rows), rows["label"])
    assert expected.coef_.shape == (3, CONCEPTS + 2)
    close(made, expected.coef_, expected.intercept_)


@pytest.mark.parametrize("solver", [spec(lambdas=0.05, **EXACT), spec(LOGISTIC, C=0.3, tol=1e-8)])
def test_a_binary_label_has_one_logit(solver: Any) -> None:
    made, data = model(solver=solver, task="binary", num_classes=2), Labelled("binary")
    fit(made, data)
    rows = data.tensors("train")
    x, y = values(made, rows).numpy(), rows["label"].numpy()
    assert made.head.linear.weight.shape == (1, CONCEPTS)
    kind = LogisticRegression if solver["class_path"] == LOGISTIC else ElasticNetPath
    expected = kind(**solver["init_args"]).fit(x, y)
    with torch.no_grad():
        found = made(rows["image"]).logits.sigmoid().squeeze(1)
    torch.testing.assert_close(found, torch.from_numpy(expected.predict_proba(x)[:, 1]).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "solver", [spec(lambdas=0.05, **EXACT), spec(lambdas=0.05, family="ovr", **EXACT), spec(LOGISTIC, C=0.3, tol=1e-8)]
)
def test_two_classes_have_two_logits(solver: Any) -> None:
    made, data = model(solver=solver, num_classes=2), Labelled("two")
    fit(made, data)
    rows = data.tensors("train")
    x, y = values(made, rows).numpy(), rows["label"].numpy()
    assert made.head.linear.weight.shape == (2, CONCEPTS)
    kind = LogisticRegression if solver["class_path"] == LOGISTIC else ElasticNetPath
    expected = kind(**solver["init_args"]).fit(x, y)
    with torch.no_grad():
        found = made(rows["image"]).logits.softmax(1)
    torch.testing.assert_close(found, torch.from_numpy(expected.predict_proba(x)).float(), rtol=1e-3, atol=1e-4)


def test_several_labels_a_sample() -> None:
    made, data = model(solver=spec(lambdas=0.05, family="ovr", **EXACT), task="multilabel"), Labelled("several")
    fit(made, data)
    rows = data.tensors("train")
    expected = ElasticNetPath(lambdas=0.05, family="ovr", **EXACT).fit(values(made, rows), rows["label"])
    close(made, expected.coef_, expected.intercept_)


@pytest.mark.parametrize("solver", [spec(lambdas=0.01, **EXACT), spec(LOGISTIC)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_class_without_a_sample_is_never_predicted(solver: Any, bias: bool) -> None:
    solver = {**solver, "init_args": {**solver["init_args"], "fit_intercept": bias}}
    made, data = model(solver=solver, head=LinearHead(bias=bias)), Labelled("unseen")
    fit(made, data)
    assert made.head.linear.weight.shape == (3, CONCEPTS)
    rows = data.tensors("train")
    assert set(made.eval()(rows["image"]).logits.argmax(1).tolist()) == {0, 2}
    assert int(made.head.linear.weight[1].count_nonzero()) == 0


def test_a_head_without_biases() -> None:
    made = model(solver=spec(lambdas=0.02, fit_intercept=False, **EXACT), head=LinearHead(bias=False))
    fit(made)
    rows = toy_tensors(96)
    expected = ElasticNetPath(lambdas=0.02, fit_intercept=False, **EXACT).fit(values(made, rows), rows["label"])
    torch.testing.assert_close(made.head.linear.weight.detach(), torch.from_numpy(expected.coef_).float())


# ---------------------------------------------------------------- the rest of the run


def test_nothing_else_moves() -> None:
    seen = Recorder()
    fit(model(), None, seen)
    before, after = seen.weights[-2:]
    for part in ("backbone", "bottleneck"):
        assert same(part_of(before, part), part_of(after, part))
    assert not same(part_of(before, "head"), part_of(after, "head"))
    assert seen.phases == ["joint", "joint", "sparse_head"]


@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 0.5},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_trainer_does_besides(options: dict[str, Any]) -> None:
    made = model(solver=spec(lambdas=0.02, **EXACT))
    fit(made, **options)
    rows = toy_tensors(96)
    with torch.autocast("cpu", torch.bfloat16, enabled="precision" in options):
        x = values(made, rows).float()
    expected = ElasticNetPath(lambdas=0.02, **EXACT).fit(x, rows["label"])
    close(made, expected.coef_, expected.intercept_)


class Stream(IterableDataset):
    """Samples without a number."""

    def __iter__(self):
        rows = toy_tensors(48)
        return ({name: column[i] for name, column in rows.items()} for i in range(48))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_stream_of_samples() -> None:
    made, rows = model(solver=spec(lambdas=0.02, **EXACT), epochs=0), toy_tensors(48)
    fit(made, DataLoader(Stream(), 16), max_epochs=1)
    expected = ElasticNetPath(lambdas=0.02, **EXACT).fit(values(made, rows), rows["label"])
    close(made, expected.coef_, expected.intercept_)


def test_a_phase_after_the_solver_goes_on_from_its_head() -> None:
    seen = Recorder()
    fit(model(phases=[*phases(epochs=1), Phase("more", lr=1e-5)]), None, seen)
    fitted, after = (weights[HEAD] for weights in seen.weights[-2:])
    assert 0 < float((after - fitted).abs().max()) < 1e-3


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(1e-3)])
def test_averages_would_replace_the_fitted_head(averaging: Callback) -> None:
    with pytest.raises(ValueError, match="phase 'sparse_head' fits the head to the latest weights, which .*Averaging"):
        fit(model(solver=spec(lambdas=0.02, **EXACT)), None, averaging)


@pytest.mark.parametrize("validated", [True, False])
def test_a_schedule_of_an_earlier_phase_leaves_the_fitted_head_alone(validated: bool, tmp_path: Path) -> None:
    options = {} if validated else {"limit_val_batches": 0}
    schedule = SparsitySchedule(mode="constant", strength=1.0, begin=0.0, end=0.0)
    made, rows = model(solver=spec(lambdas=0.02, **EXACT)), toy_tensors(96)
    fit(made, None, schedule, ModelCheckpoint(tmp_path, filename="last"), **options)
    expected = ElasticNetPath(lambdas=0.02, **EXACT).fit(values(made, rows), rows["label"])
    close(made, expected.coef_, expected.intercept_)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved[HEAD], made.head.linear.weight)
