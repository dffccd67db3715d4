"""What a reader of the code thought of: precision, stale values, odd batches and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import check_same, run, toy_model

from cbm_lightning import CBMModule, LinearBottleneck, ResidualHead
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.interventions import InterventionEngine, InterventionStudy, Person, Policy, Units
from cbm_lightning.interventions.policies import UCP, FixedOrder
from cbm_lightning.interventions.policies.base import State
from cbm_lightning.interventions.policies.prior import LearnedPrior
from cbm_lightning.interventions.values import InterventionValues, PercentileValues

pytestmark = pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(n: int, seed: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(toy_tensors(n, seed)), batch_size=16, collate_fn=TensorDataset.collate)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_percentiles_of_older_weights_are_not_taken(tmp_path: Path) -> None:
    """The last checkpoint was written an epoch after the evaluation learned its values."""
    model = CBMModule(ToyBackbone(), LinearBottleneck("logits"), concepts=4, num_classes=CLASSES, lr=0.05)
    evaluation = InterventionEvaluation(["ucp"], stages=["val", "test"], values="percentile", every_n_epochs=2)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(max_epochs=3, callbacks=[evaluation, keep], enable_checkpointing=True)
    trainer.fit(model, ToyData())
    stale = evaluation.values.logit_range.clone()
    again = InterventionEvaluation(["ucp"], stages=["val", "test"], values="percentile")
    quiet_trainer(callbacks=[again]).test(model, ToyData(), verbose=False, ckpt_path=keep.last_model_path)
    assert not torch.equal(again.values.logit_range, stale)
    fresh = InterventionEvaluation(["ucp"], values="percentile")
    quiet_trainer(callbacks=[fresh]).test(model, ToyData(), verbose=False)
    torch.testing.assert_close(again.values.logit_range, fresh.values.logit_range)


class OwnLoaders(CBMModule):
    """A module with loaders of its own, whose ``setup("fit")`` starts the head afresh."""

    def train_dataloader(self) -> DataLoader[Any]:
        return rows(96, 0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            torch.nn.init.normal_(self.head.linear.weight)


def test_a_test_never_sets_the_module_up_for_a_fit() -> None:
    model = OwnLoaders(ToyBackbone(), LinearBottleneck("logits"), concepts=4, num_classes=CLASSES)
    before = model.head.linear.weight.clone()
    evaluation = InterventionEvaluation(["ucp"], values="percentile")
    quiet_trainer(callbacks=[evaluation]).test(model, rows(41, 2), verbose=False)
    assert evaluation.result is not None
    assert torch.equal(model.head.linear.weight, before)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("head", [None, ResidualHead])
def test_what_is_learned_is_learned_in_the_precision_of_the_trainer(precision: str, head: Any) -> None:
    model = CBMModule(ToyBackbone(), LinearBottleneck("logits"), head and head(), concepts=4, num_classes=CLASSES)
    evaluation = InterventionEvaluation(["ucp", "ectp", "global_error"], values="percentile")
    trainer = quiet_trainer(callbacks=[evaluation], precision=precision)
    trainer.test(model, ToyData(), verbose=False)
    plain = trainer.callback_metrics["test/label_acc"].float()
    # in half precision ties are broken otherwise
    torch.testing.assert_close(evaluation.result.scores("ectp")[0, 0], plain, atol=0.05, rtol=0.0)
    assert evaluation.values.logit_range.isfinite().all()


def test_nothing_is_logged_while_only_concepts_train() -> None:
    model = CBMModule(ToyBackbone(), data=ToyData(), phases="sequential")
    seen: list[set[str]] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name for name in trainer.callback_metrics if name.startswith("val/intervention")})

    evaluation = InterventionEvaluation(["ucp"], stages=["val"])
    trainer = quiet_trainer(max_epochs=2, callbacks=[evaluation, Watch()])
    trainer.fit(model, ToyData())
    assert [bool(names) for names in seen[-2:]] == [False, True]


def test_metrics_that_make_no_curve_are_refused() -> None:
    with pytest.raises(ValueError, match="task_metric: of MulticlassCalibrationError less is better"):
        run(toy_model(), policies=["ucp"], task_metric=MulticlassCalibrationError(CLASSES))
    with pytest.raises(ValueError, match="average: has no effect beside task_metric"):
        run(toy_model(), policies=["ucp"], average="macro", task_metric=MulticlassAccuracy(CLASSES))
    with pytest.raises(ValueError, match="task_metric: MulticlassAccuracy gives \\[3\\] numbers"):
        run(toy_model(), policies=["ucp"], task_metric=MulticlassAccuracy(CLASSES, average=None))


def test_partial_budgets_claim_nothing_about_all_units() -> None:
    scalars = run(toy_model(), policies=["ucp"], budgets=[0, 1]).scalars()
    assert "ucp/auc" in scalars
    assert not {"ucp/halving_budget", "ucp/intervenability"} & set(scalars)


def test_what_a_person_says_wrong_does_not_change_what_is_right() -> None:
    plain, zeroed, by_class = (
        run(toy_model(), policies=["ucp"], **options)
        for options in ({}, {"on_invisible": "zero"}, {"label_level": "class"})
    )
    for result in (zeroed, by_class):
        assert result.curves["ucp"]["concept_acc"][0, 0] == plain.curves["ucp"]["concept_acc"][0, 0]


def study_of(model: CBMModule) -> InterventionStudy:
    engine = InterventionEngine(model, Units.make(model.concept_set))
    return InterventionStudy(engine, Person(model.concept_set), [UCP()], num_classes=CLASSES)


@torch.no_grad()
def test_batches_with_and_without_groups_are_not_mixed() -> None:
    model = toy_model()
    study, batch = study_of(model), toy_tensors(8, 0)
    study.add(study.encode(model(batch), {**batch, "group": torch.zeros(8)}, torch.arange(8)))
    study.add(study.encode(model(batch), batch, torch.arange(8, 16)))
    with pytest.raises(ValueError, match="group: some batches have it, some do not"):
        study.finish()


@torch.no_grad()
def test_batches_of_different_lengths_stay_apart() -> None:
    model = CBMModule(Identity(6, tokens=True), concepts=4, num_classes=CLASSES).eval()
    study = study_of(model)
    for start, length in ((0, 3), (8, 7), (16, 7)):
        batch = {
            **toy_tensors(8, start),
            "tokens": torch.randn(8, length, 6),
            "token_mask": torch.ones(8, length).bool(),
        }
        study.add(study.encode(model(batch), batch, torch.arange(start, start + 8)))
    assert study.finish().samples == 24


@torch.no_grad()
def test_a_concept_that_nobody_annotated_is_named() -> None:
    model = toy_model()
    study, batch = study_of(model), toy_tensors(8, 0)
    batch["concepts"][:, 2] = torch.nan
    study.add(study.encode(model(batch), batch, torch.arange(8)))
    with pytest.warns(UserWarning, match="1 concepts are annotated .* in none of 8 samples .*: 'small'"):
        study.finish()


def test_an_unlikely_unit_is_asked_about_in_the_end() -> None:
    class Sure(LinearBottleneck):
        def query_scores(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, -120.0, -200.0, -400.0]).expand(len(mask), -1)

    result = run(toy_model(Sure()), policies=[LearnedPrior(sample=False)])
    assert result.curves["prior"]["concepts"][0].tolist() == [0, 1, 2, 3, 4]


def test_short_names_belong_to_one_class() -> None:
    class Mine(PercentileValues):
        """Inherits the name but does not take it."""

    assert InterventionValues.registry["percentile"] is PercentileValues
    with pytest.raises(ValueError, match="name: 'ucp' is UCP's already"):

        class Other(Policy):
            name = "ucp"

            def score(self, state: State) -> torch.Tensor:
                return state.by_unit(state.probs)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policies: 'fixed' needs arguments"):
        InterventionEvaluation(["fixed"])
    with pytest.raises(TypeError, match=r"policies: expected short names \(.* or instances of Policy, got"):
        InterventionEvaluation([UCP, "rand"])
    assert InterventionEvaluation([FixedOrder(["wet"])]).policies[0].label == "fixed"


def test_draws_of_the_reading_are_an_option() -> None:
    few, many = (run(toy_model(), policies=["ucp"], reading="sample", num_draws=n) for n in (1, 20))
    with pytest.raises(AssertionError):
        check_same(few, many)
