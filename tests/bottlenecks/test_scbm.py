"""The stochastic bottleneck, against its equations written out sample by sample."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from bottlenecks.stochastic_models import ABC, GROUPED, context, covariance_of, make, predict
from recorder import record
from small_models import CLASSES, CONCEPTS, MIXED, small_model, small_samples
from torch import Tensor
from toy import WIDTH, ToyBackbone, ToyData

from cbm_lightning import CBMModule
from cbm_lightning.bottlenecks import StochasticBottleneck
from cbm_lightning.bottlenecks.scbm import annotation_covariance, precision_size
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import FeatureDims, Features, Intervention

# ---------------------------------------------------------------- prediction


def test_the_distribution_is_the_one_written_out() -> None:
    bottleneck, x = make(), torch.randn(6, 5)
    output = bottleneck(Features(x))
    entries = x @ bottleneck.spread.weight.T + bottleneck.spread.bias
    for b in range(6):
        lower, place = torch.zeros(3, 3), 0
        for i in range(3):
            for j in range(i + 1):
                entry = entries[b, place]
                lower[i, j] = torch.log1p(entry.exp()) + 1e-6 if i == j else entry
                place += 1
        torch.testing.assert_close(output.distribution.covariance_matrix[b], lower @ lower.T)
        torch.testing.assert_close(output.uncertainty[b], (lower @ lower.T).diagonal().sqrt())
    expected = x @ bottleneck.mean.weight.T + bottleneck.mean.bias
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.distribution.loc, expected)


def test_evaluation_draws_are_fixed_samples_of_the_scores() -> None:
    bottleneck = make()
    output = predict(bottleneck)
    normal, noise = bottleneck.normal, bottleneck.noise.fixed
    assert output.values.shape == (40, 6, 3)
    assert output.sample_dim
    for b in range(6):
        scores = torch.stack([output.logits[b] + output.extras["scale"][b] @ normal[s] for s in range(40)])
        torch.testing.assert_close(output.probs[b], scores.sigmoid().mean(0))
        assert torch.equal(output.values[:, b], (scores + noise > 0).float())


def test_draws_have_the_probabilities_of_the_distribution() -> None:
    bottleneck = make(samples=20000)
    output = predict(bottleneck, 4)
    mean, std = output.logits, output.uncertainty
    # of a normal score, by a fine sum
    grid = torch.linspace(-6, 6, 2001)
    weight = torch.exp(-0.5 * grid**2) / torch.exp(-0.5 * grid**2).sum()
    expected = ((mean.unsqueeze(-1) + std.unsqueeze(-1) * grid).sigmoid() * weight).sum(-1)
    torch.testing.assert_close(output.probs, expected, rtol=0, atol=0.015)
    torch.testing.assert_close(output.values.mean(0), expected, rtol=0, atol=0.02)


def test_draws_of_concepts_go_together_as_the_scores_do() -> None:
    bottleneck = make(samples=20000)
    with torch.no_grad():
        bottleneck.spread.weight.zero_()
        # rows of the factor: (1, 0, 0), (5, 1, 0), (-5, 0, 1) on top of a first score of spread 5
        bottleneck.spread.bias.copy_(torch.tensor([5.0, 5.0, 0.5, -5.0, 0.0, 0.5]))
        bottleneck.mean.weight.zero_()
        bottleneck.mean.bias.zero_()
    drawn = predict(bottleneck, 1).values[:, 0]
    found = torch.corrcoef(drawn.T)
    assert found[0, 1] > 0.4
    assert found[0, 2] < -0.4


def test_a_prediction_does_not_depend_on_the_batch() -> None:
    bottleneck, x = make(), torch.randn(6, 5)
    together = bottleneck(Features(x))
    alone = bottleneck(Features(x[2:3]))
    torch.testing.assert_close(alone.probs[0], together.probs[2])
    assert torch.equal(alone.values[:, 0], together.values[:, 2])
    again = make()
    assert torch.equal(again.normal, bottleneck.normal)
    assert not {"normal", "noise.fixed"} & bottleneck.state_dict().keys()


def test_training_draws_come_from_the_generator() -> None:
    bottleneck, x = make().train(), torch.randn(6, 5)
    drawn = []
    for seed in (0, 0, 1):
        with bottleneck.drawing(step_generator(seed)):
            drawn.append(bottleneck(Features(x)).values)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # each sample has noise of its own
    same = bottleneck(Features(x[:1].expand(6, -1))).values
    assert not torch.equal(same[:, 0], same[:, 1])
    # while only the head trains the bottleneck evaluates, but a step is a step
    with bottleneck.eval().drawing(step_generator(0)):
        assert torch.equal(bottleneck(Features(x)).values, drawn[0])


def test_the_gradient_is_that_of_a_relaxation_at_the_temperature() -> None:
    bottleneck, x = make().train(), torch.randn(6, 5)
    bottleneck.on_progress(0.5)
    with bottleneck.drawing(step_generator(3)):
        output = bottleneck(Features(x))
    generator = step_generator(3)
    normal = torch.randn(6, 40, 3, generator=generator)
    uniform = torch.rand(6, 40, 3, generator=generator)
    scores = output.logits[:, None] + torch.einsum("bij,bsj->bsi", output.extras["scale"], normal)
    relaxed = torch.sigmoid((scores + torch.logit(uniform)) / 0.5**0.5)
    assert torch.equal(output.values.transpose(0, 1), (relaxed > 0.5).float())
    weight = torch.randn(6, 40, 3)
    parameters = list(bottleneck.parameters())
    found = torch.autograd.grad((output.values.transpose(0, 1) * weight).sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad((relaxed * weight).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_member_of_a_categorical_group_is_drawn() -> None:
    bottleneck = make(concepts=GROUPED, samples=4000, strength=0.5)
    output = predict(bottleneck, 5)
    assert torch.equal(output.values[..., [0, 2, 3]].sum(-1), torch.ones(4000, 5))
    torch.testing.assert_close(output.values.mean(0), output.probs, rtol=0, atol=0.04)
    torch.testing.assert_close(output.probs[:, [0, 2, 3]].sum(-1), torch.ones(5))


# ---------------------------------------------------------------- losses


def test_losses_are_the_ones_written_out() -> None:
    bottleneck = make()
    output = predict(bottleneck, 4)
    concepts = torch.tensor([[1, 0, 1], [0.3, math.nan, 1], [math.nan] * 3, [0, 0, 0.9]])
    losses = bottleneck.losses(output, {"concepts": concepts}, context())
    total = 0.0
    for b in (0, 1, 3):
        likelihood = 0.0
        for s in range(40):
            scores = output.logits[b] + output.extras["scale"][b] @ bottleneck.normal[s]
            log_joint = 0.0
            for k, c in enumerate(concepts[b].tolist()):
                if not math.isnan(c):
                    p = torch.sigmoid(scores[k].double()).item()
                    log_joint += c * math.log(p) + (1 - c) * math.log(1 - p)
            likelihood += math.exp(log_joint) / 40
        total -= math.log(likelihood)
    # the third sample is not annotated at all
    assert losses["concept"].item() == pytest.approx(total / 3, rel=1e-4)
    inverse = torch.linalg.inv(covariance_of(output).double())
    off = sum(inverse[:, i, j].abs() for i in range(3) for j in range(3) if i != j) / 6
    assert losses["precision"].item() == pytest.approx(off.mean().item(), rel=1e-3)


def test_the_joint_loss_sees_which_concepts_go_together() -> None:
    factor = torch.tensor([[3.0, 0.0], [2.9, 0.8]])
    losses = {}
    for name, scale in (("together", factor), ("apart", torch.diag(factor.norm(dim=1)))):
        bottleneck = make("empirical", concepts=ConceptSet(["a", "b"]), samples=500)
        with torch.no_grad():
            bottleneck.mean.weight.zero_()
            bottleneck.mean.bias.zero_()
        bottleneck.factor.copy_(scale)
        concepts = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        losses[name] = bottleneck.losses(predict(bottleneck, 2), {"concepts": concepts}, context())["concept"]
    assert losses["together"] < losses["apart"] - 0.2
    # log 4 if both were a coin each, log 2 if they were one coin
    assert math.log(2) < losses["together"] < losses["apart"] < math.log(4) + 0.1


def test_losses_of_a_group_count_the_member_that_holds() -> None:
    bottleneck = make(concepts=GROUPED, samples=30)
    output = predict(bottleneck, 1)
    concepts = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    found = bottleneck.losses(output, {"concepts": concepts}, context())["concept"]
    scores = output.logits + bottleneck.normal @ output.extras["scale"][0].T
    joint = scores[:, [0, 2, 3]].softmax(-1)[:, 1] * scores[:, 1].sigmoid()
    torch.testing.assert_close(found, -joint.mean().log())


def test_there_is_no_precision_to_learn_where_the_covariance_is_fixed_and_one_where_it_is_shared() -> None:
    concepts = {"concepts": torch.ones(4, 3)}
    fixed = make("empirical")
    assert fixed.losses(predict(fixed, 4), concepts, context()).keys() == {"concept"}
    shared = make("global")
    output = predict(shared, 4)
    found = shared.losses(output, concepts, context())["precision"]
    torch.testing.assert_close(found, precision_size(output.extras["scale"]))
    assert torch.equal(output.extras["scale"][0], output.extras["scale"][3])
    assert precision_size(torch.tensor([[[2.0]]])) == 0


def test_the_label_loss_is_that_of_the_averaged_probability() -> None:
    model = small_model(StochasticBottleneck(samples=30))
    prediction = small_samples(model).prediction
    label = torch.arange(9) % CLASSES
    each = model.head.linear(prediction.concepts.values).softmax(-1).mean(0)
    expected = -each[torch.arange(9), label].log().mean()
    torch.testing.assert_close(model.label_loss(prediction.logits, label), expected)


# ---------------------------------------------------------------- annotations and covariances


def drawn_concepts(n: int = 4000) -> Tensor:
    """Three concepts, the second mostly the first, the third mostly its opposite."""
    first = torch.rand(n) < 0.6
    second = torch.where(torch.rand(n) < 0.9, first, ~first)
    third = torch.where(torch.rand(n) < 0.8, ~first, first)
    return torch.stack([first, second, third], 1).float()


def test_the_covariance_of_annotations() -> None:
    concepts = drawn_concepts()
    scores = ((0.05 + 0.9 * concepts) / (0.95 - 0.9 * concepts)).double().log()
    expected = np.cov(scores.numpy(), rowvar=False)
    np.testing.assert_allclose(annotation_covariance(concepts).numpy(), expected, rtol=1e-6)
    soft = concepts * 0.8 + 0.1
    assert annotation_covariance(soft).diagonal().max() < expected.diagonal().max()
    missing = concepts.masked_fill(torch.rand(4000, 3) < 0.3, math.nan)
    np.testing.assert_allclose(annotation_covariance(missing).numpy(), expected, atol=0.4)
    # never varies, never annotated, annotated once
    odd = torch.stack([torch.ones(50), torch.full((50,), math.nan), torch.full((50,), math.nan)], 1)
    odd[0, 2] = 1.0
    found = annotation_covariance(odd)
    assert torch.linalg.eigvalsh(found).min() > 0.9e-3
    assert found.isfinite().all()


@pytest.mark.parametrize("covariance", ["global", "empirical"])
def test_training_starts_from_the_covariance_of_the_annotations(covariance: Any) -> None:
    bottleneck, concepts = make(covariance), drawn_concepts()
    bottleneck.fit_annotations(concepts)
    expected = annotation_covariance(concepts).float()
    torch.testing.assert_close(covariance_of(predict(bottleneck, 2)), expected.expand(2, 3, 3), rtol=1e-4, atol=1e-4)
    # a second training goes on with what the first one learned
    bottleneck.fit_annotations(drawn_concepts().flip(0) * 0.5)
    torch.testing.assert_close(covariance_of(predict(bottleneck, 1))[0], expected, rtol=1e-4, atol=1e-4)
    assert bottleneck.needs_annotations
    assert len([*bottleneck.parameters()]) == (3 if covariance == "global" else 2)


def test_amortised_covariances_differ_between_inputs_and_start_alike() -> None:
    bottleneck = StochasticBottleneck()
    bottleneck.build(FeatureDims(5), ABC, 2)
    assert not bottleneck.needs_annotations
    early = covariance_of(bottleneck.eval()(Features(torch.randn(50, 5))))
    assert early.std(0).max() < 0.1
    assert covariance_of(predict(make(), 50)).std(0).min() > 0.1


# ---------------------------------------------------------------- training


def test_the_temperature_falls_exponentially_while_it_trains() -> None:
    bottleneck = make(temperature=0.25, temperature_share=0.5).train()
    found = []
    for fraction in (0.0, 0.25, 0.5, 0.75):
        bottleneck.on_progress(fraction)
        found.append(bottleneck.temperature.item())
    assert found == pytest.approx([1.0, 0.5, 0.25, 0.25])
    bottleneck.eval().on_progress(0.0)
    assert bottleneck.temperature.item() == 0.25
    assert bottleneck.state_dict()["temperature"].item() == 0.25


@pytest.mark.parametrize("covariance", ["amortized", "global", "empirical"])
@pytest.mark.parametrize("phases", ["joint", "sequential", "independent"])
def test_it_trains_and_is_restored(covariance: Any, phases: str) -> None:
    torch.manual_seed(0)
    model = CBMModule(
        ToyBackbone(),
        StochasticBottleneck(covariance, samples=20, randint=0.3),
        concepts=ToyData().concept_set,
        num_classes=3,
        phases=phases,
        lr=0.05,
    )
    recorder = record(model, max_epochs=2)
    first, last = recorder.weights[0], recorder.weights[-1]
    bottleneck = model.bottleneck
    assert not torch.equal(first["bottleneck.mean.weight"], last["bottleneck.mean.weight"])
    assert bottleneck.value_range[0].tolist() != pytest.approx([math.log(0.05 / 0.95)] * 4)
    # the last step of the bottleneck, not the last of all
    share = (2 if phases == "joint" else 1) - 1 / 6
    assert bottleneck.temperature.item() == pytest.approx(0.5 ** (share / 2), rel=1e-5)
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    copy = CBMModule(
        ToyBackbone(), StochasticBottleneck(covariance, samples=20), concepts=ToyData().concept_set, num_classes=3
    )
    copy.load_state_dict(torch.load(kept, weights_only=True))
    x = torch.randn(5, WIDTH)
    assert torch.equal(copy.eval()(x).logits, model.eval()(x).logits)


def test_it_learns_what_goes_together() -> None:
    class Tied(ToyData):
        """Concepts of coins that the input does not show; the first two are one coin, the last two opposite."""

        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            generator = torch.Generator().manual_seed(4)
            coins = (torch.rand(len(rows["label"]), 2, generator=generator) < 0.5).float()
            return {**rows, "concepts": torch.stack([coins[:, 0], coins[:, 0], coins[:, 1], 1 - coins[:, 1]], 1)}

    torch.manual_seed(0)
    model = CBMModule(
        ToyBackbone(),
        StochasticBottleneck(samples=50),
        concepts=ToyData().concept_set,
        num_classes=3,
        loss_weights={"precision": 0.0},
        lr=0.03,
    )
    data = Tied(n=640, batch_size=64)
    record(model, data, max_epochs=12)
    x = torch.randn(20, WIDTH)
    prediction = model.eval()(x)
    covariance = prediction.concepts.distribution.covariance_matrix.mean(0)
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread[:, None] / spread
    assert correlation[0, 1] > 0.8
    assert correlation[2, 3] < -0.8
    assert correlation[:2, 2:].abs().max() < 0.5
    moved = model.intervene(prediction, {"red": 1.0}).concepts.probs
    assert (moved[:, 1] - prediction.concepts.probs[:, 1]).mean() > 0.2
    assert (moved[:, 2:] - prediction.concepts.probs[:, 2:]).abs().mean() < 0.1


def test_unwritten_batches_and_half_precision() -> None:
    bottleneck = make(concepts=CONCEPTS).train()
    features, concepts = Features(torch.randn(6, 5)), torch.rand(6, 6)
    concepts[0, 1] = math.nan
    before = features.pooled.clone(), concepts.clone()
    with bottleneck.drawing(step_generator(0)), torch.autocast("cpu", torch.bfloat16):
        output = bottleneck(features, concepts)
        fixed = bottleneck.intervene(output, Intervention(concepts > 0.5, concepts.bfloat16()))
        loss = sum(bottleneck.losses(output, {"concepts": concepts}, context()).values())
    assert torch.equal(before[0], features.pooled)
    assert torch.equal(before[1].nan_to_num(), concepts.nan_to_num())
    assert all(x.dtype == torch.float32 for x in (output.probs, output.values, fixed.probs, fixed.values, loss))
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("covariance", ["amortized", "global", "empirical"])
def test_a_bottleneck_of_another_precision(covariance: str, dtype: torch.dtype) -> None:
    bottleneck = make(covariance, concepts=GROUPED).to(dtype)
    features, concepts = Features(torch.randn(6, 5).to(dtype)), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    plain = bottleneck(features)
    with bottleneck.train().drawing(step_generator(0)):
        output = bottleneck(features, concepts)
        losses = bottleneck.losses(output, {"concepts": concepts}, context())
    for found in (plain, output):
        fixed = bottleneck.intervene(found, Intervention(concepts > 0.5, concepts))
        assert found.values.dtype == fixed.values.dtype == dtype
        assert fixed.probs.isfinite().all()
    sum(losses.values()).backward()


def test_half_precision_by_default_draws_finite_noise() -> None:
    bottleneck = make(concepts=GROUPED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        noise = bottleneck.noise.draw(200, 40, step_generator(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.isfinite().all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "diagonal"}, "covariance: expected one of .*'amortized'.*, got 'diagonal'"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature: expected a number in \(0, 1\], got 0.0"),
        ({"temperature_share": 1.5}, r"temperature_share: expected a number in \(0, 1\], got 1.5"),
        ({"randint": 2.0}, "randint: expected a probability"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticBottleneck(**options)


def test_what_it_cannot_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"concepts \['weight'\] are real-valued; a stochastic bottleneck draws 0 or 1"
    ):
        StochasticBottleneck().build(FeatureDims(5), MIXED, 2)
    many = ConceptSet.make(2000)
    with pytest.raises(ValueError, match="'amortized' needs 1025 million weights for 2000 concepts .* choose 'global'"):
        StochasticBottleneck().build(FeatureDims(512), many, 2)


def test_one_concept_is_enough() -> None:
    bottleneck = make(concepts=ConceptSet(["a"]))
    output = predict(bottleneck, 3)
    losses = bottleneck.losses(output, {"concepts": torch.ones(3, 1)}, context())
    assert losses["precision"] == 0
    found = bottleneck.intervene(output, Intervention(torch.ones(3, 1).bool(), torch.ones(3, 1)))
    assert torch.equal(found.values, torch.ones(40, 3, 1))
