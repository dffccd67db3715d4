"""The autoregressive bottleneck, against its equations written out concept by concept, and exact enumeration."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from bottlenecks.autoregressive_models import GROUPED, chances, context, make, predict, score
from recorder import record
from small_models import CONCEPTS, MIXED
from torch import Tensor
from toy import WIDTH, ToyBackbone, ToyData

from cbm_lightning import CBMModule
from cbm_lightning.bottlenecks import AutoregressiveBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import FeatureDims, Features, Intervention

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


# ---------------------------------------------------------------- precision and errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bottleneck_of_another_precision(dtype: torch.dtype) -> None:
    bottleneck = make(GROUPED).to(dtype)
    features, concepts = Features(torch.randn(6, 5).to(dtype)), torch.eye(5)[[0, 1, 2, 3, 4, 1]]
    plain = bottleneck(features)
    with bottleneck.train().drawing(step_generator(0)):
        output = bottleneck(features, concepts)
        losses = bottleneck.losses(output, {"concepts": concepts}, context(concepts=GROUPED))
    for found in (plain, output):
        fixed = bottleneck.intervene(found, Intervention(concepts > 0.5, concepts))
        assert found.values.dtype == fixed.values.dtype == dtype
        assert fixed.probs.isfinite().all()
    losses["concept"].backward()


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
