"""Accuracy at numbers of effective concepts in validation and test: when it is found, of what, and what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ddp_script import PlainLoaders
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import same, states
from torch import Tensor
from torch.utils.data import DataLoader
from toy import WIDTH, ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import toy_model

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, MLPHead, Phase, ResidualHead
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import SparsityEvaluation
from cbm_lightning.callbacks import sparsity_evaluation as module
from cbm_lightning.data import CachedFeatures
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.sparsity import ElasticNetPath, NECResult, NECStudy, nec
from cbm_lightning.sparsity.study import Scores

LEVELS = [1, 2, 4]
SOLVER = {"eps": 0.03}
FITTED = ["path", "path_refit", "random", "random_refit"]
KINDS = ["path", "path_refit", "pruned", "pruned_refit", "random", "random_refit"]
OWN = {"nec", "density", "active_concepts", "max_per_class", "empty_classes"}


@pytest.fixture(autouse=True)
def _no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go to a folder of their own, and no time goes into drawing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "log_figure", lambda *_: None)


def model(bottleneck: Any = None, *args: Any, **options: Any) -> CBMModule:
    return toy_model(LinearBottleneck("logits") if bottleneck is None else bottleneck, *args, **options)


def evaluation(**options: Any) -> SparsityEvaluation:
    return SparsityEvaluation(**{"levels": LEVELS, "solver": SOLVER, **options})


def run(made: LightningModule, data: Any = None, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """The result of a test, and what was logged."""
    watcher = evaluation(**options)
    tester = quiet_trainer(callbacks=[watcher], **(trainer or {}))
    tester.test(made, ToyData() if data is None else data, verbose=False)
    return watcher.result, {name: float(value) for name, value in tester.callback_metrics.items()}


def by_hand(made: CBMModule, test: dict[str, Tensor] | None = None, own: bool = True, width: int = 1) -> NECResult:
    """The study of predictions that no Trainer made."""

    def scores(rows: dict[str, Tensor]) -> Scores:
        with torch.no_grad():
            output = made.eval()(rows).concepts
        return Scores(output.values[:, : 4 * width], output.features.pooled, rows["label"])

    study = NECStudy(4, made.head.num_outputs, made.task, LEVELS, width, SOLVER)
    study.fit(scores(toy_tensors(96)), made.head.linear_map() if own else None)
    study.add(scores(toy_tensors(41, 2) if test is None else test))
    return study.finish()


def check_same(found: NECResult, expected: NECResult, within: float = 1e-6) -> None:
    assert (found.levels, found.samples) == (expected.levels, expected.samples)
    assert found.curves.keys() == expected.curves.keys()
    for name, curve in expected.curves.items():
        assert found.curves[name].nec == pytest.approx(curve.nec), name
        assert found.curves[name].accuracy == pytest.approx(curve.accuracy, abs=within), name


# ---------------------------------------------------------------- numbers


def test_in_a_test_it_logs_the_numbers_of_the_study() -> None:
    made = model()
    result, logged = run(made)
    # the training split once, and the test split once
    assert made.backbone.calls == 6 + 3
    expected = by_hand(made)
    check_same(result, expected)
    found = {key: value for key, value in logged.items() if "/sparsity/" in key}
    heads = {f"{kind}/{key}" for kind in KINDS for key in ("anec", *(f"acc_at_nec{level}" for level in LEVELS))}
    assert found.keys() == {f"test/sparsity/{key}" for key in OWN | heads}
    assert found == pytest.approx({f"test/sparsity/{key}": value for key, value in expected.scalars().items()})
    # a head pruned to all concepts is the head itself
    assert found["test/sparsity/pruned/acc_at_nec4"] == pytest.approx(logged["test/label_acc"])
    assert found["test/sparsity/nec"] == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: model(EmbeddingBottleneck(3)),
        lambda: model(LinearBottleneck()),
        lambda: model(backbone=Identity(WIDTH)),
    ],
    ids=["embedding", "sigmoid", "identity"],
)
def test_other_models(make: Any) -> None:
    made = make()
    result, logged = run(made)
    check_same(result, by_hand(made, width=made.bottleneck.layout.width))
    assert logged["test/sparsity/pruned/acc_at_nec4"] == pytest.approx(logged["test/label_acc"])
    assert result.curves["pruned"].nec == LEVELS


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels(task: str) -> None:
    class Others(ToyData):
        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            label = (rows["label"] == 1).float()[:, None] if task == "binary" else rows["concepts"][:, :3].long()
            return {**rows, "label": label}

        @property
        def class_names(self) -> list[str]:
            return ["no", "yes"] if task == "binary" else super().class_names

        def annotations(self, split: str) -> tuple[Tensor, Tensor]:
            raise KeyError(split)

    names = Others().class_names
    made = model(task=task, num_classes=len(names), class_names=names)
    result, logged = run(made, Others())
    assert logged["test/sparsity/pruned/acc_at_nec4"] == pytest.approx(logged["test/label_acc"])
    assert result.curves["path"].anec > 0.6
    kept = pd.read_csv("media/test/sparsity/kept_concepts-step=0.csv", keep_default_na=False)
    assert kept["class"].unique().tolist() == (["yes"] if task == "binary" else ["apple", "stone", "plum"])


class Silent(CBMModule):
    """Keeps its predictions to itself, and serves several loaders."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self(self.read_batch(batch))


def test_predictions_that_a_step_keeps_to_itself_are_made_again() -> None:
    silent = model(kind=Silent)
    check_same(run(silent)[0], by_hand(model()))
    assert silent.backbone.calls == 6 + 3 + 3


def test_the_batch_size_changes_nothing() -> None:
    check_same(run(model(), ToyData(batch_size=1))[0], by_hand(model()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str) -> None:
    made = model()
    result, logged = run(made, trainer={"precision": precision})
    assert list(result.curves) == KINDS
    assert result.samples == 41
    # a few samples near a border fall on its other side
    within = 3.5 / 41
    assert logged["test/sparsity/pruned/acc_at_nec4"] == pytest.approx(logged["test/label_acc"], abs=within)
    expected = by_hand(model())
    assert result.curves["path_refit"].anec == pytest.approx(expected.curves["path_refit"].anec, abs=within)


def test_free_dimensions_are_not_read() -> None:
    made = model(LinearBottleneck("logits", extra_dims=3))
    result, logged = run(made)
    check_same(result, by_hand(made, own=False))
    assert list(result.curves) == FITTED
    assert "test/sparsity/nec" not in logged


@pytest.mark.parametrize("head", [MLPHead([5]), ResidualHead()], ids=["mlp", "residual"])
def test_a_head_that_is_no_linear_map_of_concepts_is_left_out(head: Any) -> None:
    result, logged = run(model(None, head))
    assert list(result.curves) == FITTED
    assert result.own is None
    assert "test/sparsity/nec" not in logged
    assert "test/sparsity/path/anec" in logged


def test_cached_features_give_the_same(tmp_path: Path) -> None:
    backbone = ToyBackbone(frozen=True, freeze_norm=True)
    cached = CachedFeatures(ToyData(), cache_dir=str(tmp_path / "cache"), batch_size=16)
    found = run(model(backbone=backbone), cached)[0]
    check_same(found, run(model(backbone=backbone))[0])


def test_data_of_the_users_own() -> None:
    shuffled, ordered = (run(model(), ForeignData(shuffle=shuffle))[0] for shuffle in (True, False))
    check_same(shuffled, ordered)
    assert shuffled.samples == 48


def test_a_fit_on_few_batches() -> None:
    few, every = (run(model(), fit_batches=n)[0] for n in (2, 6))
    check_same(every, by_hand(model()))
    assert few.curves != every.curves


def test_a_head_that_a_solver_made_sparse() -> None:
    solver = {"class_path": "ElasticNetPath", "init_args": {"nec": 2}}
    phases = [Phase("joint", epochs=1), Phase("sparse", train=["head"], solver=solver)]
    made = model(phases=phases)
    quiet_trainer(max_epochs=2).fit(made, ToyData())
    result, logged = run(made)
    assert logged["test/sparsity/nec"] == pytest.approx(nec(made.head.concept_weight().detach())) == 2
    assert logged["test/sparsity/density"] == 0.5
    assert result.curves["pruned"].nec[1:] == [2, 2]
    assert result.curves["pruned"].accuracy[1:] == pytest.approx([logged["test/label_acc"]] * 2)
    # the path of the evaluation is that of the phase
    assert result.curves["path"].accuracy[1] == pytest.approx(logged["test/label_acc"], abs=0.03)


# ---------------------------------------------------------------- when


def made_at(monkeypatch: pytest.MonkeyPatch, made: CBMModule | None = None, **options: Any) -> list[Any]:
    seen = []

    def keep(trainer: Any, name: str, *_: Any) -> None:
        seen.append((name, trainer.current_epoch, trainer.sanity_checking))

    monkeypatch.setattr(module, "log_html", keep)
    trainer = quiet_trainer(max_epochs=4, callbacks=[evaluation(**options)], num_sanity_val_steps=2)
    made = made or model()
    trainer.fit(made, ToyData())
    trainer.validate(made, ToyData(), verbose=False)
    trainer.test(made, ToyData(), verbose=False)
    return seen


def test_it_runs_every_nth_epoch_and_not_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    val = "val/sparsity/kept_concepts_page"
    assert made_at(monkeypatch, stages=["val"], every_n_epochs=2) == [(val, 1, False), (val, 3, False), (val, 4, False)]


def test_by_default_it_runs_in_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, *_ in made_at(monkeypatch)] == ["test/sparsity/kept_concepts_page"]


def test_it_waits_for_a_phase_in_which_labels_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = Phase("concepts", epochs=3, train=["backbone", "bottleneck"], loss_weights={"label": 0.0})
    sequential = model(phases=[concepts, Phase("labels", train=["head"])])
    assert [epoch for _, epoch, _ in made_at(monkeypatch, sequential, stages=["val"])] == [3, 4]


def test_a_checkpoint_can_follow_it(tmp_path: Path) -> None:
    watcher = evaluation(stages=["val"], every_n_epochs=2)
    key = "val/sparsity/path_refit/acc_at_nec2"
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor=key, mode="max", save_top_k=-1, every_n_epochs=2)
    trainer = quiet_trainer(max_epochs=4, callbacks=[watcher, keep], enable_checkpointing=True)
    trainer.fit(model(lr=0.02), ToyData())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=1.ckpt", "epoch=3.ckpt"}
    assert float(trainer.callback_metrics[key]) == pytest.approx(watcher.result.curves["path_refit"].accuracy[1])
    assert float(keep.best_model_score) >= float(trainer.callback_metrics[key])


def test_a_run_with_it_trains_the_same_weights() -> None:
    ends = []
    for watchers in ([], [evaluation(stages=["val"])]):
        torch.manual_seed(0)
        made = model(LinearBottleneck("logits", randint=0.3), backbone=ToyBackbone(dropout=0.3), lr=0.02)
        torch.manual_seed(1)
        quiet_trainer(max_epochs=2, callbacks=watchers).fit(made, ToyData())
        ends.append((states(made), torch.get_rng_state()))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


class Augmented(ToyData):
    """Reading a training sample draws a number."""

    def make_split(self, name: str) -> TensorDataset:
        return TensorDataset(self.tensors(name), lambda batch: {**batch, "noise": torch.rand(len(batch["label"]))})


def test_it_leaves_modes_weights_and_randomness_as_they_are() -> None:
    made = model(backbone=ToyBackbone(dropout=0.3))
    before, seen = states(made), []

    class Look(SparsityEvaluation):
        def begin(self, trainer, pl_module, stage, loaders):
            state = torch.get_rng_state()
            super().begin(trainer, pl_module, stage, loaders)
            modes = [part.training for part in pl_module.modules()]
            seen.append((torch.equal(state, torch.get_rng_state()), any(modes), torch.is_inference_mode_enabled()))

    quiet_trainer(callbacks=[Look(LEVELS, solver=SOLVER)]).test(made, Augmented(), verbose=False)
    assert seen == [(True, False, True)]
    assert made.training
    assert same(before, states(made))
    assert all(weight.grad is None for weight in made.parameters())


# ---------------------------------------------------------------- several at once, and processes


def loader(seed: int = 2, n: int = 41) -> DataLoader[Any]:
    return DataLoader(TensorDataset(toy_tensors(n, seed)), batch_size=16, collate_fn=TensorDataset.collate)


class TwoTests(ToyData):
    """Two test loaders."""

    def test_dataloader(self) -> Any:
        return [loader(2), loader(5, 23)]


def test_every_test_loader_has_its_curves() -> None:
    made = model(kind=Silent)
    result, logged = run(made, TwoTests())
    expected = [by_hand(made), by_hand(made, toy_tensors(23, 5))]
    check_same(result, expected[0])
    for i, each in enumerate(expected):
        for key, value in each.scalars().items():
            assert logged[f"test/sparsity/{key}/dataloader_idx_{i}"] == pytest.approx(value)
        table = pd.read_csv(f"media/test/sparsity/accuracy/dataloader_idx_{i}-step=0.csv")
        assert table["accuracy"].tolist() == pytest.approx(each.table()["accuracy"].tolist())
        assert Path(f"media/test/sparsity/kept_concepts_page/dataloader_idx_{i}-step=0.html").is_file()


def test_two_evaluations_in_one_trainer() -> None:
    first, second = evaluation(), evaluation(levels=[3], random_concepts=False, refit_ridge=None, name="sparse")
    tester = quiet_trainer(callbacks=[first, second])
    tester.test(model(), ToyData(), verbose=False)
    check_same(first.result, by_hand(model()))
    assert list(second.result.curves) == ["path", "pruned"]
    assert "test/sparse/path/acc_at_nec3" in tester.callback_metrics
    assert "test/sparsity/path/acc_at_nec4" in tester.callback_metrics


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:Using `DistributedSampler`")
@pytest.mark.parametrize("data", ["ours", "plain", "two loaders"])
def test_two_processes_find_what_one_finds(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(kind: str) -> Any:
        def write(trainer: Any, name: str, content: Any) -> None:
            if kind != "figure":
                text = content if isinstance(content, str) else content.to_csv()
                file = tmp_path / f"{trainer.world_size}/{trainer.global_rank}/{kind}/{name.replace('/', '_')}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)

        return write

    for kind in ("table", "html", "figure"):
        monkeypatch.setattr(module, f"log_{kind}", keep(kind))
    make = {"ours": lambda: ToyData(n=47, batch_size=4), "plain": PlainLoaders, "two loaders": TwoTests}[data]
    made, logged = model(kind=Silent), []
    for processes in (1, 2):
        strategy = "auto" if processes == 1 else "ddp_fork"
        tester = quiet_trainer(callbacks=[evaluation()], devices=processes, strategy=strategy)
        found = tester.test(made, make(), verbose=False)
        logged.append({key: value for each in found for key, value in each.items() if "/sparsity/" in key})
    assert len(logged[0]) == (len(OWN) + 4 * len(KINDS)) * (2 if data == "two loaders" else 1)
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)
    # the first process alone writes, and what it writes is the same
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["0"]
    tables = [sorted((tmp_path / f"{n}/0/table").iterdir()) for n in (1, 2)]
    assert [path.name for path in tables[0]] == [path.name for path in tables[1]]
    for one, two in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(pd.read_csv(one), pd.read_csv(two), atol=1e-4)


# ---------------------------------------------------------------- classes and concepts


@pytest.mark.parametrize("unseen", range(3))
def test_kept_concepts_have_the_names_of_their_classes(unseen: int) -> None:
    class Without(ToyData):
        """No training sample of one class."""

        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            there = (rows["label"] != unseen) | torch.tensor(name != "train")
            return {key: value[there] for key, value in rows.items()}

    names = ToyData().class_names
    made = model(class_names=names)
    run(made, Without(), levels=[2, 4])
    train = Without().tensors("train")
    with torch.no_grad():
        values = made.eval()(train).concepts.values
    fitted = ElasticNetPath(nec=[2, 4], **SOLVER).fit(values, train["label"])
    weight = fitted.at_nec(2).weight
    kept = pd.read_csv("media/test/sparsity/kept_concepts-step=0.csv", keep_default_na=False)
    for row, label in zip(weight, fitted.classes_, strict=True):
        expected = {ToyData().concept_set.names[k] for k in row.nonzero().flatten().tolist()} or {""}
        assert set(kept[kept["class"] == names[label]]["concept"]) == expected, names[label]
    assert set(kept[kept["class"] == names[unseen]]["concept"]) <= {""}
