"""The autoregressive bottleneck, against its equations written out concept by concept, and exact enumeration."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from golden_models import engine_of, planned
from recorder import record
from small_models import CONCEPTS, MIXED, small_model, small_samples
from torch import Tensor
from toy import WIDTH, ToyBackbone, ToyData

from cbm_lightning import CBMModule
from cbm_lightning.bottlenecks import AutoregressiveBottleneck
from cbm_lightning.bottlenecks.autoregressive import systematic
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions import Policy
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention, LossContext

ABC = ConceptSet(["a", "b", "c"])
# the group comes in the middle, with a member on either side of a concept
GROUPED = ConceptSet(
    ["dry", "red", "wet", "blue", "green"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["binary", "categorical", "binary", "categorical", "categorical"],
)


def make(concepts: ConceptSet = ABC, strength: float = 1.0, **options: Any) -> AutoregressiveBottleneck:
    """A bottleneck in evaluation mode on features of width 5 whose concepts depend on each other."""
    bottleneck = AutoregressiveBottleneck(**{"hidden": 4, "samples": 40, **options})
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    with torch.no_grad():
        for weight in bottleneck.parameters():
            weight.normal_(0.0, strength)
        bottleneck.from_concepts.mul_(2.0)
    return bottleneck.eval()


def predict(bottleneck: AutoregressiveBottleneck, n: int = 4) -> ConceptOutput:
    with torch.no_grad():
        return bottleneck(Features(torch.randn(n, 5)))


def score(bottleneck: AutoregressiveBottleneck, x: Tensor, k: int, before: dict[int, float]) -> float:
    """Logit of a concept of one sample: a network on the features and the concepts before it."""
    hidden = bottleneck.hidden
    total = bottleneck.out_bias[k].item()
    for unit in range(hidden):
        row = k * hidden + unit
        inner = (bottleneck.from_features.weight[row] @ x + bottleneck.from_features.bias[row]).item()
        inner += sum(bottleneck.from_concepts[k, unit, j].item() * c for j, c in before.items())
        total += bottleneck.out_weight[k, unit].item() * (inner if inner > 0 else 0.01 * inner)
    return total


def chances(bottleneck: AutoregressiveBottleneck, x: Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every combination of three binary concepts, by the chain rule."""
    found = {}
    for row in itertools.product((0, 1), repeat=3):
        chance = 1.0
        for k in range(3):
            p = 1 / (1 + math.exp(-score(bottleneck, x, k, {j: float(row[j]) for j in range(k)})))
            chance *= p if row[k] else 1 - p
        found[row] = chance
    return found


def context(loss: ConceptLoss | None = None, concepts: ConceptSet = ABC) -> LossContext:
    loss = ConceptLoss() if loss is None else loss
    loss.build(concepts)
    return LossContext(loss, lambda logits, label: logits.sum(), torch.nn.Identity(), torch.zeros(1, 1))


# ---------------------------------------------------------------- prediction


def test_scores_are_those_of_a_network_a_concept() -> None:
    bottleneck, x = make(), torch.randn(4, 5)
    concepts = (torch.rand(4, 3) < 0.5).float()
    found = bottleneck.scores(Features(x), concepts)
    for b, k in itertools.product(range(4), range(3)):
        before = {j: concepts[b, j].item() for j in range(k)}
        assert found[b, k].item() == pytest.approx(score(bottleneck, x[b], k, before), abs=1e-4)


def test_a_concept_sees_those_before_it_only() -> None:
    bottleneck = make(GROUPED)
    concepts = torch.rand(1, 5, requires_grad=True)
    found = bottleneck.scores(Features(torch.randn(1, 5)), concepts)
    sees = torch.stack([torch.autograd.grad(z, concepts, retain_graph=True)[0][0] != 0 for z in found[0]])
    # dry, then the colours at once, then wet
    expected = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert sees.int().tolist() == expected


def test_draws_are_ancestral() -> None:
    bottleneck, x = make(), torch.randn(3, 5)
    output = bottleneck(Features(x))
    assert output.values.shape == (40, 3, 3)
    assert output.sample_dim
    chance = torch.zeros(3, 3)
    for b, s in itertools.product(range(3), range(40)):
        drawn: dict[int, float] = {}
        for k in range(3):
            logit = score(bottleneck, x[b], k, drawn)
            chance[b, k] += 1 / (1 + math.exp(-logit)) / 40
            drawn[k] = float(logit + bottleneck.noise.fixed[s, k].item() >= 0)
        assert output.values[s, b].tolist() == list(drawn.values())
    torch.testing.assert_close(output.probs, chance, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.logits.sigmoid(), output.probs, rtol=0, atol=1e-5)


def test_many_draws_have_the_probabilities_of_the_chain_rule() -> None:
    bottleneck, x = make(samples=20000, strength=0.7), torch.randn(1, 5)
    drawn = bottleneck(Features(x)).values[:, 0]
    for row, chance in chances(bottleneck, x[0]).items():
        share = (drawn == torch.tensor(row)).all(1).float().mean().item()
        assert share == pytest.approx(chance, abs=0.015)


def test_one_member_of_a_group_is_drawn() -> None:
    bottleneck = make(GROUPED, samples=4000, strength=0.7)
    output = predict(bottleneck)
    assert torch.equal(output.values[..., [1, 3, 4]].sum(-1), torch.ones(4000, 4))
    torch.testing.assert_close(output.values.mean(0), output.probs, rtol=0, atol=0.03)
    torch.testing.assert_close(output.probs[:, [1, 3, 4]].sum(1), torch.ones(4))
    torch.testing.assert_close(bottleneck.activation(output.logits), output.probs, rtol=0, atol=1e-4)


def test_a_prediction_does_not_depend_on_the_batch() -> None:
    bottleneck, x = make(), torch.randn(6, 5)
    together, alone = bottleneck(Features(x)), bottleneck(Features(x[2:3]))
    torch.testing.assert_close(alone.probs[0], together.probs[2])
    assert torch.equal(alone.values[:, 0], together.values[:, 2])
    assert "noise.fixed" not in bottleneck.state_dict()


# ---------------------------------------------------------------- training


def test_in_training_the_networks_see_annotations_and_the_head_draws() -> None:
    bottleneck, x = make(training_samples=3).train(), torch.randn(6, 5)
    concepts = (torch.rand(6, 3) < 0.5).float()
    outputs = []
    for seed in (0, 0, 1):
        with bottleneck.drawing(step_generator(seed)):
            outputs.append(bottleneck(Features(x), concepts))
    torch.testing.assert_close(outputs[0].logits, bottleneck.scores(Features(x), concepts))
    assert torch.equal(outputs[0].probs, outputs[0].logits.sigmoid())
    assert outputs[0].values.shape == (3, 6, 3)
    assert torch.equal(outputs[0].values, outputs[1].values)
    assert not torch.equal(outputs[0].values, outputs[2].values)
    assert set(outputs[0].values.unique().tolist()) == {0.0, 1.0}
    (gradient,) = torch.autograd.grad(outputs[0].values.sum(), bottleneck.out_weight)
    assert (gradient != 0).all()


def test_the_loss_is_the_likelihood_in_training_and_evaluation() -> None:
    bottleneck, x = make(), torch.randn(4, 5)
    concepts = (torch.rand(4, 3) < 0.5).float()
    expected = -sum(math.log(chances(bottleneck, x[b])[tuple(concepts[b].int().tolist())]) for b in range(4)) / 12
    for training in (True, False):
        bottleneck.train(training)
        output = bottleneck(Features(x), concepts if training else None)
        loss = bottleneck.losses(output, {"concepts": concepts}, context())["concept"]
        assert loss.item() == pytest.approx(expected, abs=1e-4)
    weighted = context(ConceptLoss(weight=[1.0, 0.0, 0.0]))
    first = bottleneck.losses(output, {"concepts": concepts}, weighted)["concept"] * 3
    sure = torch.tensor([score(bottleneck, row, 0, {}) for row in x])
    torch.testing.assert_close(first, cross_entropy(sure, concepts[:, 0]), rtol=0, atol=1e-4)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


@pytest.mark.parametrize("training", [True, False])
def test_unknown_annotations_are_drawn_from_the_model(training: bool) -> None:
    bottleneck, x = make(samples=1).train(training), torch.randn(2000, 5)[:1].expand(2000, -1)
    concepts = torch.tensor([1.0, math.nan, 1.0]).expand(2000, 3)
    output = bottleneck(Features(x), concepts if training else None)
    known = bottleneck._annotated(Features(x), concepts)
    assert torch.equal(known[:, [0, 2]], torch.ones(2000, 2))
    assert not known.isnan().any()
    middle = 1 / (1 + math.exp(-score(bottleneck, x[0], 1, {0: 1.0})))
    if training:
        assert known[:, 1].mean().item() == pytest.approx(middle, abs=0.04)
        expected = bottleneck.scores(Features(x), torch.tensor([[1.0, 1, 1]]))
        assert torch.equal(output.logits[:, :2], expected[:, :2].expand(2000, 2))
    else:
        # one fixed draw, the same for all
        assert known[:, 1].unique().numel() == 1
    assert bottleneck.losses(output, {"concepts": concepts}, context())["concept"].isfinite()


def test_soft_annotations_are_drawn() -> None:
    bottleneck = make(GROUPED).train()
    features = Features(torch.randn(3000, 5))
    soft = torch.tensor([0.2, 0.5, 0.9, 0.3, 0.2]).expand(3000, 5)
    seen = bottleneck._annotated(features, soft)
    torch.testing.assert_close(seen.mean(0), soft[0], rtol=0, atol=0.04)
    assert torch.equal(seen[:, [1, 3, 4]].sum(1), torch.ones(3000))


@pytest.mark.parametrize("phases", ["joint", "sequential", "independent"])
def test_it_trains_and_is_restored(phases: str) -> None:
    torch.manual_seed(0)
    model = CBMModule(
        ToyBackbone(),
        AutoregressiveBottleneck(8, 30, randint=0.3),
        concepts=ToyData().concept_set,
        num_classes=3,
        phases=phases,
        lr=0.05,
    )
    recorder = record(model, max_epochs=2)
    moved = {
        name for name, weight in recorder.weights[0].items() if not torch.equal(weight, recorder.weights[-1][name])
    }
    assert {name for name, _ in model.named_parameters()} <= moved
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    copy = CBMModule(ToyBackbone(), AutoregressiveBottleneck(8, 30), concepts=ToyData().concept_set, num_classes=3)
    copy.load_state_dict(torch.load(kept, weights_only=True))
    x = torch.randn(5, WIDTH)
    assert torch.equal(copy.eval()(x).logits, model.eval()(x).logits)


def test_it_learns_what_goes_together() -> None:
    class Tied(ToyData):
        """Coins that the input does not show: the third concept holds where the first two do."""

        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            generator = torch.Generator().manual_seed(4)
            coins = (torch.rand(len(rows["label"]), 2, generator=generator) < 0.5).float()
            both = coins.prod(1)
            return {**rows, "concepts": torch.stack([*coins.unbind(1), both, 1 - both], 1)}

    torch.manual_seed(0)
    model = CBMModule(ToyBackbone(), AutoregressiveBottleneck(), concepts=ToyData().concept_set, num_classes=3, lr=0.03)
    record(model, Tied(n=640, batch_size=64), max_epochs=8)
    prediction = model.eval()(torch.randn(20, WIDTH))
    drawn = prediction.concepts.values
    assert (drawn[..., :2].prod(-1) == drawn[..., 2]).float().mean() > 0.95
    assert (drawn[..., 2] != drawn[..., 3]).float().mean() > 0.95
    # what comes before follows too: not both, but the first
    moved = model.intervene(prediction, {"red": 1.0, "small": 0.0}).concepts.probs
    assert prediction.concepts.probs[:, 1].mean() > 0.3
    assert moved[:, 1].mean() < 0.2
    assert moved[:, 3].mean() > 0.9


# ---------------------------------------------------------------- corrections


@pytest.mark.parametrize("told", [{0: 1}, {1: 0}, {2: 1}, {0: 0, 2: 1}, {1: 1, 2: 0}])
def test_corrections_condition_on_all_concepts(told: dict[int, int]) -> None:
    bottleneck = make(samples=20000, strength=0.7)
    output = predict(bottleneck, 2)
    mask = torch.zeros(2, 3).bool()
    values = torch.full((2, 3), 0.123)
    for k, c in told.items():
        mask[:, k], values[:, k] = True, c
    found = bottleneck.intervene(output, Intervention(mask, values))
    for b in range(2):
        exact = chances(bottleneck, output.features.pooled[b])
        left = {row: p for row, p in exact.items() if all(row[k] == c for k, c in told.items())}
        total = sum(left.values())
        for k in range(3):
            expected = sum(p for row, p in left.items() if row[k]) / total
            assert found.probs[b, k].item() == pytest.approx(expected, abs=0.02)
            assert found.values[:, b, k].mean().item() == pytest.approx(expected, abs=0.02)
    assert torch.equal(found.values[..., mask[0]], values[:, mask[0]].expand(20000, 2, -1))
    assert found.features is output.features


def test_nothing_everything_and_soft_corrections() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    values = torch.tensor([[1.0, 0.0, 0.3]]).expand(5, 3)
    nothing = bottleneck.intervene(output, Intervention(torch.zeros(5, 3).bool(), values))
    assert torch.equal(nothing.values, output.values)
    assert torch.equal(nothing.probs, output.probs)
    everything = bottleneck.intervene(output, Intervention(torch.ones(5, 3).bool(), values))
    assert torch.equal(everything.values, values.expand(40, 5, 3))
    assert torch.equal(everything.probs, values)
    row = torch.arange(5) == 2
    one = bottleneck.intervene(output, Intervention(row[:, None] & torch.tensor([True, False, True]), values))
    assert torch.equal(one.values[:, ~row], output.values[:, ~row])
    assert torch.equal(one.values[:, 2, [0, 2]], values[2, [0, 2]].expand(40, 2))


def test_a_later_correction_reweighs_and_an_earlier_one_draws_anew() -> None:
    bottleneck = make()
    output = predict(bottleneck, 1)
    ones = torch.ones(1, 3)
    first = bottleneck.intervene(output, Intervention(torch.tensor([[True, False, False]]), ones))
    x = output.features.pooled[0]
    expected = 1 / (1 + math.exp(-score(bottleneck, x, 1, {0: 1.0})))
    assert first.probs[0, 1].item() == pytest.approx(expected, abs=1e-4)
    last = bottleneck.intervene(output, Intervention(torch.tensor([[False, False, True]]), ones))
    logits = [score(bottleneck, x, 2, dict(enumerate(row[:2].tolist()))) for row in output.values[:, 0]]
    weight = torch.tensor(logits).sigmoid()
    kept = ((output.values[:, 0, :2] * weight[:, None]).sum(0) / weight.sum()).tolist()
    # up to the rounding of 40 equally weighted draws
    assert last.values[:, 0, :2].mean(0).tolist() == pytest.approx(kept, abs=0.03)
    assert {tuple(row) for row in last.values[:, 0, :2].tolist()} <= {
        tuple(r) for r in output.values[:, 0, :2].tolist()
    }


def test_equal_weights_choose_each_draw_once() -> None:
    assert torch.equal(systematic(torch.full((2, 100), 0.01)), torch.arange(100).expand(2, 100))
    weight = torch.rand(5, 40).square()
    weight = weight / weight.sum(1, keepdim=True)
    count = torch.stack([row.bincount(minlength=40) for row in systematic(weight)])
    assert count.sum(1).tolist() == [40] * 5
    assert ((count - 40 * weight).abs() < 1).all()


def test_what_is_taken_out_says_nothing_of_the_others() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    mask = torch.tensor([True, True, False]).expand(5, 3)
    without = bottleneck.intervene(output, Intervention(mask, torch.tensor([math.nan, 1.0, 0.0]).expand(5, 3)))
    alone = bottleneck.intervene(output, Intervention(mask & torch.tensor([False, True, True]), torch.ones(5, 3)))
    assert not without.values[..., 0].any()
    assert torch.equal(without.values[..., 1:], alone.values[..., 1:])
    assert torch.equal(without.probs, alone.probs)


def test_one_after_another_is_all_at_once() -> None:
    bottleneck = make(CONCEPTS)
    output = predict(bottleneck, 8)
    first, both = torch.rand(8, 6) < 0.4, torch.rand(8, 6) < 0.3
    both = both | first
    values = (torch.rand(8, 6) < 0.5).float()
    values[0, first[0]] = math.nan
    step = bottleneck.intervene(output, Intervention(first, values))
    step = bottleneck.intervene(step, Intervention(both & ~first, values))
    at_once = bottleneck.intervene(output, Intervention(both, values))
    for found, expected in zip(step.tensors(), at_once.tensors(), strict=True):
        assert torch.equal(found.nan_to_num(nan=7), expected.nan_to_num(nan=7))
    changed = bottleneck.intervene(step, Intervention(first, 1 - values))
    assert torch.equal(changed.probs[first & ~values.isnan()], (1 - values)[first & ~values.isnan()])


@pytest.mark.parametrize("told", [{3: 1.0}, {3: 0.0}, {1: 0.0, 3: 0.0}, {2: 1.0}, {2: 1.0, 4: 0.0}])
def test_members_of_a_group_exclude_each_other(told: dict[int, float]) -> None:
    bottleneck = make(GROUPED, samples=20000, strength=0.7)
    output = predict(bottleneck, 1)
    mask, values = torch.zeros(1, 5).bool(), torch.zeros(1, 5)
    for k, c in told.items():
        mask[:, k], values[:, k] = True, c
    found = bottleneck.intervene(output, Intervention(mask, values))
    assert torch.equal(found.values[..., [1, 3, 4]].sum(-1), torch.ones(20000, 1))
    # those of the plain draws that agree
    agree = (output.values[:, 0] == values[0])[:, mask[0]].all(1)
    expected = output.values[agree, 0].mean(0)
    torch.testing.assert_close(found.values[:, 0].mean(0), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(found.probs[0], expected, rtol=0, atol=0.03)


def test_corrections_in_training_pass_gradients_and_use_draws_of_the_step() -> None:
    bottleneck = make(training_samples=4).train()
    x, concepts = torch.randn(6, 5), torch.ones(6, 3)
    mask = torch.tensor([True, False, False]).expand(6, 3)
    found = []
    for _ in range(2):
        with bottleneck.drawing(step_generator(0)):
            output = bottleneck(Features(x), concepts)
            found.append(bottleneck.intervene(output, Intervention(mask, concepts)).values)
    assert torch.equal(*found)
    assert found[0].shape == (4, 6, 3)
    found[0][..., 1:].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in bottleneck.parameters())
    assert bottleneck.from_concepts.grad[1, :, 0].abs().sum() > 0


def test_the_engine_corrects_it_concept_by_concept() -> None:
    model = small_model(AutoregressiveBottleneck(hidden=4, samples=60))
    samples = small_samples(model)
    engine = engine_of(model)
    steps = planned(engine, samples, Policy.make("ucp"))
    with torch.inference_mode():
        found = engine.rollout(samples, steps, range(7))
    torch.testing.assert_close(found.logits[0], samples.prediction.logits)
    told = model.head.linear(samples.answers.told)
    torch.testing.assert_close(found.logits[-1].softmax(-1), told.softmax(-1))


# ---------------------------------------------------------------- precision and errors


def test_unwritten_batches_and_half_precision() -> None:
    bottleneck = make(CONCEPTS).train()
    features, concepts = Features(torch.randn(6, 5)), (torch.rand(6, 6) < 0.5).float()
    concepts[0, 1] = math.nan
    before = features.pooled.clone(), concepts.clone()
    with bottleneck.drawing(step_generator(0)), torch.autocast("cpu", torch.bfloat16):
        output = bottleneck(features, concepts)
        fixed = bottleneck.intervene(output, Intervention(concepts == 1, concepts.bfloat16()))
        loss = bottleneck.losses(output, {"concepts": concepts}, context(concepts=CONCEPTS))["concept"]
    assert torch.equal(before[0], features.pooled)
    assert torch.equal(before[1].nan_to_num(), concepts.nan_to_num())
    assert all(x.dtype == torch.float32 for x in (output.probs, output.values, fixed.probs, fixed.values, loss))
    loss.backward()


@pytest.mark.parametrize("name", ["hidden", "samples", "training_samples"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        AutoregressiveBottleneck(**{name: 0})


def test_real_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"concepts \['weight'\] are real-valued; an autoregressive bottleneck draws"):
        AutoregressiveBottleneck().build(FeatureDims(5), MIXED, 2)


def test_networks_start_as_layers_of_their_own_would() -> None:
    bottleneck = AutoregressiveBottleneck(hidden=400)
    bottleneck.build(FeatureDims(5), ConceptSet.make(12), 2)
    for k in (0, 11):
        bound = (5 + k) ** -0.5
        weight = bottleneck.from_features.weight.unflatten(0, (12, 400))[k]
        assert 0.95 * bound < weight.abs().max() <= bound
    assert bottleneck.out_weight.abs().max() <= 400**-0.5
