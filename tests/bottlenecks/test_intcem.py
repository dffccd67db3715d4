"""Intervention-aware embeddings: what a training step rehearses, against the same written out sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import Log
from small_models import CONCEPTS, MIXED, WIDTH, small_model, true_concepts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.bottlenecks import EmbeddingBottleneck, InterventionAwareBottleneck, intcem_policy
from cbm_lightning.bottlenecks.intcem_policy import QueryPolicy, Rehearsal, straight_through_draw
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.heads import LabelHead, MLPHead, ResidualHead
from cbm_lightning.labels import label_outcomes
from cbm_lightning.losses import label_loss
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext

HEADS: dict[str, Callable[[], LabelHead | None]] = {
    "linear": lambda: None,
    "mlp": lambda: MLPHead([9], dropout=0.5),
    "residual": lambda: ResidualHead(dropout=0.5),
    "residual mlp": lambda: ResidualHead(MLPHead([9])),
}
GROUPS = list(CONCEPTS.group_indices().values())
UNITS = {"concept": [[k] for k in range(len(CONCEPTS))], "group": GROUPS}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainable(head: str = "linear", task: str = "multiclass", concepts: ConceptSet = CONCEPTS, **options: Any) -> Any:
    """A small model with drawn weights, in training mode."""
    bottleneck = InterventionAwareBottleneck(3, **{"hidden": [8], **options})
    return small_model(bottleneck, HEADS[head](), task, concepts).train()


def batch_for(model: CBMModule, n: int = 7, missing: float = 0.0, seed: int = 0) -> Batch:
    generator = drawn(seed)
    concepts = true_concepts(model.concept_set, n, generator)
    concepts[torch.rand(concepts.shape, generator=generator) < missing] = torch.nan
    shape = (n, model.num_classes) if model.task == "multilabel" else (n,)
    label = torch.randint(2 if model.task == "multilabel" else model.num_classes, shape, generator=generator)
    return {"embedding": torch.randn(n, WIDTH, generator=generator), "concepts": concepts, "label": label}


def losses_of(model: CBMModule, batch: Batch, seed: int | None = 0) -> tuple[dict[str, Tensor], ConceptOutput]:
    """Unweighted losses as a training step (with a seed) or an evaluation step computes them."""
    output = model.bottleneck(model.encode(batch))
    context = LossContext(model.concept_loss, model.label_loss, model.head, model.head(output))
    if seed is None:
        return model.bottleneck.losses(output, batch, context), output
    with model.bottleneck.drawing(drawn(seed)):
        return model.bottleneck.losses(output, batch, context), output


def rehearsal_of(model: CBMModule, batch: Batch) -> Rehearsal:
    output, known = model.bottleneck(model.encode(batch)), ~batch["concepts"].isnan()
    outcomes = label_outcomes(batch["label"], model.task)
    truth = batch["concepts"].nan_to_num(nan=0.0)
    return Rehearsal(output, truth, known, outcomes, model.head, model.bottleneck.membership)


def zeros(rehearsal: Rehearsal) -> Tensor:
    return torch.zeros_like(rehearsal.truth)


def likelihoods(model: CBMModule, output: ConceptOutput, batch: Batch, mask: Tensor, units: list[list[int]]) -> Tensor:
    """``[B, U]`` probability of the true label after correcting each unit: one intervention and head call a unit."""
    columns, label = [], batch["label"]
    model.head.eval()
    for members in units:
        more = mask.bool().clone()
        more[:, members] |= ~batch["concepts"][:, members].isnan()
        logits = model.head(model.bottleneck.intervene(output, Intervention(more, batch["concepts"])))
        if model.task == "multiclass":
            columns.append(logits.softmax(-1)[torch.arange(len(label)), label])
        else:
            yes = logits.sigmoid()
            columns.append(torch.where(label.view(logits.shape) == 1, yes, 1 - yes).prod(-1))
    model.head.train()
    return torch.stack(columns, 1).detach()


class Spy:
    """Keeps what a function was given and what it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], Any]] = []
        original = getattr(owner, name)

        def spied(*args: Any) -> Any:
            kept = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            result = original(*args)
            self.calls.append((kept, result))
            return result

        monkeypatch.setattr(owner, name, spied)


# ---------------------------------------------------------------- the equations


def test_in_evaluation_it_is_a_concept_embedding_model() -> None:
    ours, plain = InterventionAwareBottleneck(4), EmbeddingBottleneck(4, shared_scorer=False)
    for made in (ours, plain):
        made.build(FeatureDims(5), CONCEPTS, num_classes=3)
    missing = plain.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    assert ours.randint == 0
    assert ours.score_weight.shape == (6, 8)
    x = torch.randn(5, 5)
    for a, b in zip(ours(Features(x)).tensors(), plain(Features(x)).tensors(), strict=True):
        assert torch.equal(a, b)
    model = trainable().eval()
    assert losses_of(model, batch_for(model), seed=None)[0].keys() == {"concept"}


@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_losses_written_out(unit: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainable(head, unit=unit, horizon=5.0, num_rollouts=2, gamma=1.3, discount=0.7, batch_norm=False)
    model.head.eval()  # without its dropout
    batch = batch_for(model, missing=0.2)
    play, draw = Spy(monkeypatch, Rehearsal, "play"), Spy(monkeypatch, intcem_policy, "straight_through_draw")
    found, output = losses_of(model, batch, seed=3)
    assert len(play.calls) == 2
    choices = [selected.argmax(1).tolist() for _, selected in draw.calls]
    labels, imitations = [], []
    before = label_loss(model.head(output), batch["label"], "multiclass")
    for (_, policy, mask, steps, _, _), _ in play.calls:
        mask, total, weights = mask.bool(), torch.zeros(()), 0.0
        for step in range(steps):
            corrected = model.bottleneck.intervene(output, Intervention(mask, batch["concepts"]))
            scores = policy.layers(torch.cat([corrected.values, mask.float()], 1))
            target = likelihoods(model, output, batch, mask, UNITS[unit])
            model.head.eval()
            rows, chosen = [], choices.pop(0)
            for b in range(len(mask)):
                known = ~batch["concepts"][b].isnan()
                free = [u for u, ks in enumerate(UNITS[unit]) if known[ks].any() and not mask[b, ks].any()]
                if not free:
                    continue
                best = max(range(len(free)), key=lambda i: float(target[b, free[i]]))
                rows.append(cross_entropy(scores[b, free], torch.tensor(best)))
                assert chosen[b] in free
                for k in UNITS[unit][chosen[b]]:
                    mask[b, k] |= known[k]
            total, weights = total + 0.7**step * torch.stack(rows).mean(), weights + 0.7**step
        imitations.append(total / weights)
        after = model.head(model.bottleneck.intervene(output, Intervention(mask, batch["concepts"])))
        weight = 1.3**steps
        labels.append((before + weight * label_loss(after, batch["label"], "multiclass")) / (1 + weight))
    assert not choices
    torch.testing.assert_close(found["label"], torch.stack(labels).mean())
    torch.testing.assert_close(found["imitation"], torch.stack(imitations).mean())
    torch.testing.assert_close(found["concept"], model.concept_loss(output.logits, batch["concepts"]))


@pytest.mark.parametrize("most", [2**24, 40])
@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("head", HEADS)
def test_the_expert_chooses_what_makes_the_true_label_likeliest(
    head: str, task: str, unit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intcem_policy, "MOST_NUMBERS", most)
    model = trainable(head, task, unit=unit)
    batch = batch_for(model, n=11, missing=0.2)
    rehearsal = rehearsal_of(model, batch)
    mask = rehearsal.random_start(0.3, drawn())
    open_units = rehearsal.open_units(mask)
    expected = likelihoods(model, rehearsal.output, batch, mask, UNITS[unit]).masked_fill(~open_units, -1.0)
    chosen = rehearsal.best_units(mask, open_units)
    best = expected.amax(1)
    torch.testing.assert_close(expected.gather(1, chosen[:, None])[:, 0], best)
    assert len(chosen[open_units.any(1)].unique()) > 1
    # dropout does not mislead it, and it leaves no mode behind
    assert all(torch.equal(rehearsal.best_units(mask, open_units), chosen) for _ in range(3))
    assert model.head.training


def test_a_choice_is_a_straight_through_draw_from_the_softmax() -> None:
    scores = torch.tensor([[0.3, 1.2, -0.5, torch.finfo(torch.float).min]]).repeat(6000, 1).requires_grad_()
    chosen = straight_through_draw(scores, drawn())
    assert set(chosen.unique().tolist()) == {0.0, 1.0}
    assert (chosen.sum(1) == 1).all()
    torch.testing.assert_close(chosen.mean(0), scores[0].softmax(-1), rtol=0, atol=0.02)
    assert torch.equal(straight_through_draw(scores, drawn()), chosen)
    assert not torch.equal(straight_through_draw(scores, drawn(1)), chosen)
    weight = torch.randn(4)
    (slope,) = torch.autograd.grad((chosen * weight).sum(), scores)
    # the gradient is that of the relaxed draw, which the same noise gives
    noise = -torch.empty(scores.shape).exponential_(generator=drawn()).log()
    soft = (scores.detach() + noise).softmax(-1)
    torch.testing.assert_close(slope, soft * (weight - (soft * weight).sum(1, keepdim=True)))


def test_the_policy_reads_values_and_mask_through_normalised_layers() -> None:
    policy = QueryPolicy(6, 2, 3, [5, 4])
    kinds = [type(layer) for layer in policy.layers]
    block = [nn.BatchNorm1d, nn.Linear, nn.LeakyReLU]
    assert kinds == [*block, *block, nn.BatchNorm1d, nn.Linear]
    assert [type(x) for x in QueryPolicy(6, 2, 3, [5], batch_norm=False).layers] == [nn.Linear, nn.LeakyReLU, nn.Linear]
    values, mask = torch.randn(9, 6), (torch.rand(9, 2) < 0.5).float()
    x = torch.cat([values, mask], 1)
    for layer in policy.layers:
        if isinstance(layer, nn.BatchNorm1d):
            x = (x - x.mean(0)) / (x.var(0, correction=0) + layer.eps).sqrt()
        elif isinstance(layer, nn.Linear):
            x = x @ layer.weight.T + layer.bias
        else:
            x = torch.where(x > 0, x, 0.01 * x)
    torch.testing.assert_close(policy(values, mask), x)
    # one sample, the last of an epoch say, has no variance
    assert policy(values[:1], mask[:1]).isfinite().all()
    assert policy.layers[0].training


def test_query_scores_follow_the_corrections_and_no_other_sample() -> None:
    model = trainable(unit="group").eval()
    batch = batch_for(model)
    with torch.inference_mode():
        output = model.bottleneck(model.encode(batch))
        nothing = torch.zeros(7, 6, dtype=torch.bool)
        scores = model.bottleneck.query_scores(output, nothing)
        mask = nothing.clone()
        mask[:, :2] = True
        after = model.bottleneck.query_scores(
            model.bottleneck.intervene(output, Intervention(mask, batch["concepts"])), mask
        )
        alone = model.bottleneck(Features(batch["embedding"][2:3]))
        torch.testing.assert_close(model.bottleneck.query_scores(alone, nothing[2:3])[0], scores[2])
    assert scores.shape == after.shape == (7, 3)
    assert not torch.allclose(scores, after)


# ---------------------------------------------------------------- what the official code gets wrong


@pytest.mark.parametrize("unit", ["concept", "group"])
def test_no_concept_is_corrected_twice(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official mask can become 2, and the probability 2c - p; its policy is not masked in training."""
    model = trainable(unit=unit)
    batch = batch_for(model, missing=0.3)
    rehearsal = rehearsal_of(model, batch)
    draw = Spy(monkeypatch, intcem_policy, "straight_through_draw")
    steps = len(UNITS[unit]) + 2  # more than there are
    loss, mask = rehearsal.play(model.bottleneck.policy, zeros(rehearsal), steps, 1.0, drawn())
    # all that is annotated was asked about, exactly once; what is not never was
    assert torch.equal(mask.detach(), rehearsal.known.float())
    asked = torch.zeros(7, len(UNITS[unit]))
    for (scores, _), selected in draw.calls:
        closed = (asked > 0) | ~rehearsal.open_units(zeros(rehearsal))
        assert (scores[closed] == torch.finfo(torch.float).min).all()
        asked += selected.detach() * ~closed.all(1, keepdim=True)
    assert asked.max() == 1
    assert loss.isfinite()
    twice = rehearsal.corrected(mask, torch.ones(7, len(UNITS[unit])))
    assert torch.equal(twice.detach(), rehearsal.known.float())
    assert torch.equal(rehearsal.values(twice), rehearsal.values(mask))


def test_every_rollout_starts_from_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official rollouts correct a view of the first mask, so that a second one starts where the first ended."""
    model = trainable(num_rollouts=3, initial_mask=0.4)
    start, more = Spy(monkeypatch, Rehearsal, "random_start"), Spy(monkeypatch, Rehearsal, "at_random")
    play = Spy(monkeypatch, Rehearsal, "play")
    losses_of(model, batch_for(model))
    ((_, first),) = start.calls
    assert 0 < first.sum() < first.numel()
    assert len(more.calls) == 3
    for (_, mask, *_), result in more.calls:
        assert torch.equal(mask, first)
        assert (result >= first).all()
    for (_, _, mask, *_), (_, after) in play.calls:
        assert (after >= mask).all()
        assert (after > mask).any()


@pytest.mark.parametrize("unit", ["concept", "group"])
def test_the_trajectory_trains_the_policy(unit: str) -> None:
    """In the official group mode no gradient passes the choice."""
    model = trainable(unit=unit)
    found, _ = losses_of(model, batch_for(model))
    last = model.bottleneck.policy.layers[-1].weight
    (slope,) = torch.autograd.grad(found["label"], last, retain_graph=True)
    assert slope.abs().max() > 1e-5
    (slope,) = torch.autograd.grad(found["imitation"], last)
    assert slope.abs().max() > 1e-5


def test_corrections_in_training_are_those_of_intervene() -> None:
    model = trainable()
    batch = batch_for(model, missing=0.3)
    batch["concepts"] = 0.2 + 0.6 * batch["concepts"]  # annotators who hesitate
    rehearsal = rehearsal_of(model, batch)
    mask = rehearsal.random_start(0.5, drawn())
    expected = model.bottleneck.intervene(rehearsal.output, Intervention(mask.bool(), batch["concepts"])).values
    torch.testing.assert_close(rehearsal.values(mask), expected)
    assert torch.equal(rehearsal.values(zeros(rehearsal)), rehearsal.output.values)


# ---------------------------------------------------------------- schedules and draws


@pytest.mark.parametrize("unit", ["concept", "group"])
def test_where_a_trajectory_begins(unit: str) -> None:
    model = trainable(unit=unit)
    rehearsal = rehearsal_of(model, batch_for(model, n=2000, missing=0.1))
    units, known = len(UNITS[unit]), rehearsal.known
    for probability in (0.0, 0.25, 1.0):
        mask = rehearsal.random_start(probability, drawn())
        torch.testing.assert_close(mask[known].mean().item(), probability, rtol=0, atol=0.02)
        assert not mask[~known].any()
    for members in UNITS[unit]:  # of a unit all or nothing, as far as it is known
        part, there = rehearsal.random_start(0.25, drawn())[:, members], known[:, members]
        assert ((part.bool() == there).all(1) | ~part.any(1)).all()
    start = rehearsal.random_start(0.25, drawn())
    for most in (1, 2, 10):
        free, left = (
            rehearsal.open_units(start).sum(1),
            rehearsal.open_units(rehearsal.at_random(start, most, drawn())).sum(1),
        )
        taken = free - left
        assert (taken >= 0).all()
        assert ((left >= 1) == (free >= 1)).all()
        assert taken.unique().tolist() == list(range(min(most, units - 1)))
    everyone = rehearsal.at_random(zeros(rehearsal), 3, drawn()).mean(0)
    assert everyone.max() - everyone.min() < 0.08  # no unit is preferred


def test_the_horizon_grows_and_bounds_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainable(unit="concept", horizon_growth=1.3, max_horizon=4)
    bottleneck, batch = model.bottleneck, batch_for(model)
    assert "horizon" in bottleneck.state_dict()
    assert "horizon" not in dict(bottleneck.named_parameters())
    play = Spy(monkeypatch, Rehearsal, "play")
    horizons, steps = [], []
    for seed in range(40):
        horizons.append(float(bottleneck.horizon))
        losses_of(model, batch, seed)
        steps.append(play.calls[-1][0][3])
    torch.testing.assert_close(torch.tensor(horizons), (2 * 1.3 ** torch.arange(40)).clamp(max=7.0))
    assert steps[:2] == [1, 1]  # horizons of 2 and 2.6: below 2
    assert set(steps) == {1, 2, 3}
    # two units leave one step
    few = trainable(unit="group", horizon=9.0, concepts=ConceptSet(["a", "b"]))
    assert {few.bottleneck._steps(6) for few.bottleneck.generator in [drawn(s) for s in range(5)]} == {1}
    model.eval()
    bottleneck.horizon.fill_(3.0)
    losses_of(model, batch, seed=None)
    losses_of(model, batch, seed=0)  # a phase in which the bottleneck stands still
    assert bottleneck.horizon == 3


def test_draws_come_from_the_generator_of_the_step_alone() -> None:
    model = trainable()
    batch = batch_for(model)
    state = torch.get_rng_state()
    first, second = (losses_of(copy.deepcopy(model), batch, seed=4)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [losses_of(copy.deepcopy(model), batch, seed)[0]["label"] for seed in range(5)]
    assert len({loss.item() for loss in others}) > 1


# ---------------------------------------------------------------- odd input


@pytest.mark.parametrize("case", ["all missing", "a sample without any", "one sample", "one concept", "two units"])
def test_whatever_the_batch_every_parameter_gets_a_gradient(case: str) -> None:
    """As data parallel training needs it."""
    concepts = {"one concept": ConceptSet(["a"]), "two units": ConceptSet(["a", "b"])}.get(case, CONCEPTS)
    model = trainable(concepts=concepts)
    batch = batch_for(model, n=1 if case == "one sample" else 5)
    if case == "all missing":
        batch["concepts"].fill_(torch.nan)
    if case == "a sample without any":
        batch["concepts"][2] = torch.nan
    given = {name: tensor.clone() for name, tensor in batch.items()}
    found, _ = losses_of(model, batch)
    sum(found.values()).backward()
    assert all(loss.isfinite() for loss in found.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, tensor in batch.items():
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=0, equal_nan=True)
    if case == "all missing":
        assert found["imitation"] == 0


def test_half_precision() -> None:
    model = trainable()
    batch = batch_for(model)
    single, _ = losses_of(copy.deepcopy(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = losses_of(model, batch)
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, loss in found.items():
        torch.testing.assert_close(loss.float(), single[name], rtol=0.2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision(dtype: torch.dtype) -> None:
    model = trainable().to(dtype)
    batch = batch_for(model)
    found, _ = losses_of(model, batch | {"embedding": batch["embedding"].to(dtype)})
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels_and_categorical_groups(task: str) -> None:
    colours = ConceptSet(["red", "blue", "wet"], {"colour": ["red", "blue"]}, ["categorical", "categorical", "binary"])
    model = trainable(task=task, concepts=colours)
    found, _ = losses_of(model, batch_for(model))
    assert found.keys() == {"concept", "label", "imitation"}
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "image"}, "unit: expected 'concept' or 'group', got 'image'"),
        ({"hidden": [8, 0]}, "hidden: expected widths of at least 1"),
        ({"initial_mask": 1.5}, "initial_mask: expected a probability in \\[0, 1\\], got 1.5"),
        ({"horizon": 0.5}, "horizon: expected at least 1"),
        ({"horizon_growth": 0.9}, "horizon_growth: expected at least 1"),
        ({"max_horizon": 1}, "max_horizon: expected at least 2, got 1"),
        ({"num_rollouts": 0}, "num_rollouts: expected at least 1, got 0"),
        ({"gamma": 0.0}, "gamma: expected a positive number, got 0.0"),
        ({"discount": -1.0}, "discount: expected a positive number, got -1.0"),
        ({"embedding_size": 0}, "embedding_size: expected at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterventionAwareBottleneck(**options)


def test_real_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match="\\['weight'\\] are real-valued"):
        InterventionAwareBottleneck().build(FeatureDims(5), MIXED, 2)


# ---------------------------------------------------------------- training


def toy(**options: Any) -> CBMModule:
    torch.manual_seed(0)
    given = {"loss_weights": {"imitation": 1.0, "concept": 5.0}, "lr": 0.02, **options}
    bottleneck = InterventionAwareBottleneck(4, unit="concept", hidden=[16])
    return CBMModule(ToyBackbone(), bottleneck, concepts=ToyData().concept_set, num_classes=CLASSES, **given)


def test_training_learns_to_ask(tmp_path: Any) -> None:
    model, log = toy(), Log()
    trainer = quiet_trainer(max_epochs=14, logger=log, default_root_dir=tmp_path)
    trainer.fit(model, ToyData())
    first, last = ([row[key] for row in log.rows if key in row] for key in ("train/loss_imitation", "train/loss_label"))
    assert first[-1] < 0.85 * first[0]
    assert last[-1] < 0.4 * last[0]
    # an order that was learned, against any order
    curves = InterventionEvaluation(["rand", "prior"], unit="concept", num_seeds=5)
    tester = quiet_trainer(callbacks=[curves], default_root_dir=tmp_path)
    tester.test(model, ToyData(n_eval=300), verbose=False)
    found = tester.callback_metrics
    assert found["test/intervention/prior/auc"] > found["test/intervention/rand/auc"] + 0.01
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = CBMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.bottleneck.horizon == model.bottleneck.horizon > 2
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert again.bottleneck.spec() == model.bottleneck.spec()


def test_where_only_the_head_trains_it_reads_what_the_phase_says() -> None:
    phases = [
        {"name": "together", "epochs": 1},
        {"name": "head", "train": ["head"], "head_input": "true", "lr": 1e-12},
    ]
    model, log = toy(phases=phases), Log()
    quiet_trainer(max_epochs=2, logger=log).fit(model, ToyData())
    logged = [row["train/loss_label"] for row in log.rows if "train/loss_label" in row]
    model.eval()
    content = ToyData().tensors("train")
    output = model(content).concepts
    everything = Intervention(torch.ones_like(output.probs).bool(), content["concepts"])
    expected = model.label_loss(model.head(model.bottleneck.intervene(output, everything)), content["label"])
    assert logged[1] == pytest.approx(expected.item(), rel=1e-4)
    assert abs(logged[0] - logged[1]) > 0.05


def test_it_needs_the_gradient_of_the_label() -> None:
    with pytest.raises(ValueError, match="trains the bottleneck without the label's gradient"):
        quiet_trainer(max_epochs=2).fit(toy(phases="sequential"), ToyData())
