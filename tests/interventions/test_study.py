"""Several policies on one stream of predictions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from small_models import CONCEPTS, MODELS, WIDTH, small_model, true_concepts
from torch.distributions import Normal

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.interventions import InterventionEngine, Person, Policy, Units
from cbm_lightning.interventions import study as study_module
from cbm_lightning.interventions.policies import CooP, Rand
from cbm_lightning.interventions.study import InterventionStudy, StudyResult, check_labels
from cbm_lightning.types import Batch, Prediction

POLICIES = ["rand", "ucp", "ectp", "coop", "greedy"]
N = 30


def study_of(model: CBMModule, policies: Any = POLICIES, scope: Any = "single", **options: Any) -> InterventionStudy:
    units = Units.make(model.concept_set, "group")
    made = [Policy.make(policy) for policy in policies]
    for policy in made:
        policy.build(units)
    options = {"num_classes": model.num_classes, "num_seeds": 2, **options}
    return InterventionStudy(InterventionEngine(model, units, scope=scope), Person(model.concept_set), made, **options)


def rows(model: CBMModule, n: int = N, **more: Any) -> Batch:
    g = torch.Generator().manual_seed(3)
    concepts = true_concepts(model.concept_set, n, g)
    concepts[torch.rand(concepts.shape, generator=g) < 0.1] = torch.nan
    shape = (n, model.num_classes) if model.task == "multilabel" else (n,)
    label = torch.randint(2 if model.task == "multilabel" else model.num_classes, shape, generator=g)
    return {"embedding": torch.randn(n, WIDTH, generator=g), "concepts": concepts, "label": label, **more}


def feed(study: InterventionStudy, model: CBMModule, batch: Batch, size: int) -> StudyResult:
    with torch.inference_mode():
        whole = model(batch)
        for i in range(0, N, size):
            cut = slice(i, i + size)
            prediction = Prediction(whole.logits[cut], whole.concepts.map(lambda x, cut=cut: x[cut]))
            index = torch.arange(N)[cut]
            study.add(study.encode(prediction, {name: x[cut] for name, x in batch.items()}, index))
        return study.finish()


def check_same(found: StudyResult, expected: StudyResult) -> None:
    assert found.samples == expected.samples == N
    assert found.curves.keys() == expected.curves.keys()
    for policy, curves in expected.curves.items():
        assert torch.equal(found.scores(policy), expected.scores(policy)), policy
        for name, curve in curves.items():
            torch.testing.assert_close(found.curves[policy][name], curve, equal_nan=True)


@pytest.mark.parametrize("scope", ["single", "batch"])
@pytest.mark.parametrize("kind", ["logits", "embedding", "mlp", "multilabel", "mixed"])
def test_curves_do_not_depend_on_batches_and_blocks(kind: str, scope: str) -> None:
    model = MODELS[kind]()
    batch = rows(model, group=torch.arange(N) % 3)
    expected = feed(study_of(model, scope=scope), model, batch, N)
    assert expected.scores("rand").shape == (2, len(expected.budgets))
    for size, block_size in ((1, 1), (1, 7), (30, 7), (4, 7), (4, 1024)):
        check_same(feed(study_of(model, scope=scope, block_size=block_size), model, batch, size), expected)


def test_outputs_that_cannot_be_joined_are_worked_on_one_by_one() -> None:
    model = MODELS["logits"]()
    batch = rows(model)
    expected = feed(study_of(model), model, batch, N)

    class Uncertain(CBMModule):
        def forward(self, x):
            logits, output = super().forward(x)
            return Prediction(logits, output.replace(distribution=Normal(output.logits, 1.0)))

    model.__class__ = Uncertain
    check_same(feed(study_of(model, block_size=8), model, batch, 4), expected)
    check_same(
        feed(study_of(model, scope="batch"), model, batch, 4), feed(study_of(model, scope="batch"), model, batch, N)
    )


def test_a_sample_that_came_twice_counts_once() -> None:
    model = MODELS["sigmoid"]()
    batch = rows(model)
    for scope in ("single", "batch"):
        expected = feed(study_of(model, scope=scope), model, batch, N)
        study = study_of(model, scope=scope)
        with torch.inference_mode():
            twice = {name: torch.cat([x, x[:5]]) for name, x in batch.items()}
            index = torch.cat([torch.arange(N), torch.arange(5)])
            samples = study.encode(model(twice), twice, index, torch.arange(N + 5) < N)
            study.add(samples)
        check_same(study.finish(), expected)


def test_in_single_scope_full_blocks_are_forgotten() -> None:
    model = MODELS["sigmoid"]()
    batch = rows(model)
    for scope, kept in (("single", [False, False, True]), ("batch", [True, True, True])):
        study = study_of(model, ["ucp"], scope, block_size=8)
        alive = []
        for i in (0, 4, 8):
            part = {name: x[i : i + 4] for name, x in batch.items()}
            with torch.inference_mode():
                samples = study.encode(model(part), part, torch.arange(i, i + 4))
                alive.append(weakref.ref(samples.prediction.concepts.logits))
                study.add(samples)
            del samples
        gc.collect()
        assert [ref() is not None for ref in alive] == kept


def test_blocks_are_small_where_there_are_many_classes_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(LinearBottleneck())
    assert study_of(model).block_size == 1024
    # 4 budgets of 4 classes
    monkeypatch.setattr(study_module, "LARGEST_ROLLOUT", 100)
    assert study_of(model).block_size == 6
    monkeypatch.setattr(study_module, "LARGEST_ROLLOUT", 1)
    assert study_of(model).block_size == 1


def test_two_policies_need_two_labels() -> None:
    with pytest.raises(ValueError, match=r"policies: several are called \['coop'\]; give each a label of its own"):
        study_of(MODELS["sigmoid"](), [CooP(), "ucp", CooP()])
    check_labels([CooP(), CooP(label="other")])
    with pytest.raises(ValueError, match="policies: expected at least one, such as 'rand' or 'ucp', got none"):
        study_of(MODELS["sigmoid"](), [])


@pytest.mark.parametrize("field", ["num_seeds", "block_size"])
def test_numbers_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        study_of(MODELS["sigmoid"](), **{field: 0})


@pytest.mark.parametrize("name", ["concepts", "label"])
def test_a_batch_without_annotations_or_labels_is_refused(name: str) -> None:
    model = MODELS["sigmoid"]()
    batch = rows(model)
    del batch[name]
    with pytest.raises(ValueError, match=f"the batch has no '{name}', only .*need annotated concepts and labels"):
        study_of(model).encode(model({"embedding": batch["embedding"]}), batch, torch.arange(N))


def test_what_a_result_says() -> None:
    model = MODELS["sigmoid"]()
    batch = rows(model, group=torch.arange(N) % 3)
    result = feed(study_of(model, [Rand(label="any"), "ucp"], num_seeds=3), model, batch, N)
    assert result.budgets == [0, 1, 2, 3]
    table = result.table()
    assert list(table.columns[:3]) == ["policy", "seed", "budget"]
    assert len(table) == (3 + 1) * 4
    line = table[(table["policy"] == "any") & (table["seed"] == 2) & (table["budget"] == 3)].iloc[0]
    assert line["label_acc"] == pytest.approx(float(result.scores("any")[2, 3]))
    plain = (model(batch).logits.argmax(-1) == batch["label"]).float().mean()
    assert set(table[table["budget"] == 0]["label_acc"]) == {float(plain)}
    scalars = result.scalars(target=2.0)
    assert scalars["ucp/final"] == pytest.approx(float(result.scores("ucp")[0, -1]))
    assert scalars["any/auc"] == pytest.approx(float(torch.trapezoid(result.scores("any")).mean() / 3))
    assert {"ucp/gain", "ucp/monotonicity", "ucp/intervenability", "ucp/worst_group_auc"} <= set(scalars)
    # nothing reaches 2, and what has no value is no scalar
    assert not {name for name in scalars if name.endswith("target_budget")}
    assert scalars.keys() <= result.scalars(target=0.0).keys()


def test_trials_of_a_policy_that_draws_differ_and_come_back() -> None:
    model = MODELS["embedding"]()
    batch = rows(model)
    first, again = (feed(study_of(model, ["rand"], num_seeds=4), model, batch, N) for _ in range(2))
    check_same(again, first)
    scores = first.scores("rand")
    assert (scores[:, 0] == scores[0, 0]).all()
    assert (scores[:, -1] == scores[0, -1]).all()
    losses = first.curves["rand"]["loss"]
    assert len(losses[:, 1].unique()) == 4


def test_costs_are_those_of_the_units_that_were_asked_about() -> None:
    model = MODELS["sigmoid"]()
    units = Units.make(CONCEPTS, "group", costs={"size": 2.5, "wet": 0.0})
    policy = Policy.make("ucp")
    policy.build(units)
    study = InterventionStudy(
        InterventionEngine(model, units), Person(CONCEPTS), [policy], num_classes=4, budgets=[1.0]
    )
    batch = rows(model)
    batch["concepts"] = batch["concepts"].nan_to_num(nan=1.0)
    curves = feed(study, model, batch, N).curves["ucp"]
    assert curves["cost"][0].tolist() == [0.0, 3.5]
    assert curves["concepts"][0].tolist() == [0.0, 6.0]
