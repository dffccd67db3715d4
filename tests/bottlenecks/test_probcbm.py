from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import answered, engine_of, planned
from recorder import Recorder, part_of, same
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from toy import quiet_trainer
from toy_images import ToyConv, ToyImages, batch_of, toy_model

from cbm_lightning import CBMModule
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import ProbabilisticBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LinearHead, PrototypeHead
from cbm_lightning.interventions import Person, Policy
from cbm_lightning.phases import Phase
from cbm_lightning.randomness import Randomness, step_generator
from cbm_lightning.saliency import concept_maps
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention

B, N, WIDTH, D = 5, 6, 7, 4
CONCEPTS = ConceptSet(["a", "b", "c"])
GROUPED = ConceptSet(
    ["a", "red", "blue", "green"], {"colour": ["red", "blue", "green"]}, ["binary", *["categorical"] * 3]
)
PHASES = [
    Phase("warm_up", train=["bottleneck"], epochs=1, loss_weights={"label": 0.0}),
    Phase("concepts", train=["backbone", "bottleneck"], epochs=2, loss_weights={"label": 0.0}),
    Phase("labels", train=["head"], epochs=2, loss_weights={"concept": 0.0, "kl": 0.0}),
]


def make(concepts: ConceptSet = CONCEPTS, **options: Any) -> ProbabilisticBottleneck:
    """In evaluation, with drawn weights, and statistics that are not those of the start."""
    made = ProbabilisticBottleneck(**{"embedding_size": D, "samples": 8, **options})
    made.build(FeatureDims(WIDTH, WIDTH), concepts, num_classes=2)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name != "scale":
                weight.copy_(torch.randn(weight.shape))
        made.norm.running_mean.normal_()
        made.norm.running_var.uniform_(0.5, 2.0)
    return made.eval()


def features(batch: int = B, mask: Tensor | None = None) -> Features:
    tokens = torch.randn(batch, N, WIDTH)
    return Features(tokens.mean(1), tokens, mask, None if mask is not None else (2, 3))


def plain(bottleneck: ProbabilisticBottleneck, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, logarithm of the variance and attention of a concept for the tokens ``[N, WIDTH]`` of one sample."""
    own = slice(k * D, (k + 1) * D)
    norm = bottleneck.norm
    cells = tokens @ bottleneck.stem.weight[own].T
    cells = (cells - norm.running_mean[own]) / (norm.running_var[own] + norm.eps).sqrt()
    cells = (cells * norm.weight[own] + norm.bias[own]).clamp(min=0.0)

    def attend(pool: Any) -> tuple[Tensor, Tensor]:
        scores = torch.stack([torch.tanh(cell @ pool.first.weight[k]) @ pool.second.weight[k, :, 0] for cell in cells])
        share = scores.exp() / scores.exp().sum()
        return sum(s * cell for s, cell in zip(share, cells, strict=True)), share

    def mapped(layer: Any, x: Tensor) -> Tensor:
        return x @ layer.weight[k] + layer.bias[k]

    head, spread = bottleneck.mean_head, bottleneck.variance_head
    attended, attention = attend(head.pool)
    mixed = mapped(head.base, cells.mean(0)) + torch.sigmoid(mapped(head.residual, attended))
    mixed = (mixed - mixed.mean()) / (mixed.var(correction=0) + 1e-5).sqrt() * head.gain[k] + head.shift[k]
    log_variance = mapped(spread.residual, attend(spread.pool)[0]) + mapped(spread.base, cells.mean(0))
    return mixed / mixed.square().sum().sqrt(), log_variance.clamp(max=10.0), attention


def plain_probability(bottleneck: ProbabilisticBottleneck, z: Tensor, k: int) -> Tensor:
    absent, present = (anchor / anchor.square().sum().sqrt() for anchor in bottleneck.anchors[:, k])
    distances = torch.stack([(z - absent).square().sum().sqrt(), (z - present).square().sum().sqrt()])
    return (-bottleneck.scale * distances).softmax(0)[1]


# ---------------------------------------------------------------- equations


def test_means_variances_and_probabilities_follow_the_equations() -> None:
    bottleneck, given = make(), features()
    output = bottleneck(given)
    assert not output.sample_dim
    for i in range(B):
        for k in range(3):
            mean, log_variance, attention = plain(bottleneck, given.tokens[i], k)
            torch.testing.assert_close(output.values[i, k * D : (k + 1) * D], mean)
            torch.testing.assert_close(output.extras["log_variance"][i, k], log_variance, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.probs[i, k], plain_probability(bottleneck, mean, k))
            torch.testing.assert_close(output.uncertainty[i, k], log_variance.mean().exp(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(output.maps[i, k].flatten(), attention, rtol=1e-4, atol=1e-6)


def test_training_averages_the_probabilities_of_samples_that_its_generator_draws() -> None:
    bottleneck, given = make(), features()
    with bottleneck.drawing(step_generator(0, 3)):
        output = bottleneck(given)
    noise = torch.randn(8, B, 3 * D, generator=step_generator(0, 3))
    assert output.sample_dim
    for i in range(B):
        for k in range(3):
            mean, log_variance, _ = plain(bottleneck, given.tokens[i], k)
            own = slice(k * D, (k + 1) * D)
            drawn = mean + noise[:, i, own] * (0.5 * log_variance).exp()
            torch.testing.assert_close(output.values[:, i, own], drawn, rtol=1e-4, atol=1e-4)
            each = torch.stack([plain_probability(bottleneck, z, k) for z in drawn])
            torch.testing.assert_close(output.probs[i, k], each.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logits.sigmoid(), output.probs)


def test_the_divergence_is_summed_over_dimensions_and_holds_the_variance_alone() -> None:
    model = image_model()
    output = model.bottleneck(model.encode(batch_of()))
    mean, log_variance = output.extras["mean"], output.extras["log_variance"]
    exact = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    found = losses_of(model, output, batch_of())
    torch.testing.assert_close(found["kl"], exact)
    torch.testing.assert_close(mean.norm(dim=-1), torch.ones(6, 3))
    # NaN is unknown, and soft annotations count
    batch = batch_of(concepts=torch.tensor([[1.0, torch.nan, 0.3]]).repeat(6, 1))
    known = torch.nn.functional.binary_cross_entropy(output.probs[:, [0, 2]], batch["concepts"][:, [0, 2]])
    torch.testing.assert_close(losses_of(model, output, batch)["concept"], known)


def test_members_of_a_group_share_a_softmax_in_every_sample() -> None:
    bottleneck, given = make(GROUPED), features()
    torch.testing.assert_close(bottleneck(given).probs[:, 1:].sum(1), torch.ones(B))
    with bottleneck.drawing(step_generator(0)):
        output = bottleneck(given)
    each = bottleneck.activation(bottleneck.scores(output.values))
    torch.testing.assert_close(output.probs, each.mean(0))
    torch.testing.assert_close(bottleneck.activation(output.logits), each.mean(0))


def test_a_variance_cannot_overflow() -> None:
    bottleneck = make()
    with torch.no_grad():
        bottleneck.variance_head.base.bias.fill_(1000.0)
    output = bottleneck(features())
    assert (output.extras["log_variance"] == 10.0).all()


# ---------------------------------------------------------------- draws


def test_evaluation_takes_means_or_fixed_samples_whatever_else_is_in_the_batch() -> None:
    for inference in ("mean", "sample"):
        bottleneck, given = make(inference=inference), features()
        output = bottleneck(given)
        assert output.sample_dim == (inference == "sample")
        alone = bottleneck(Features(given.pooled[2:3], given.tokens[2:3]))
        torch.testing.assert_close(alone.values[..., 0, :], output.values[..., 2, :])
        torch.testing.assert_close(alone.probs[0], output.probs[2])
        assert torch.equal(bottleneck(given).values, output.values)
    twin = make(inference="sample")
    assert torch.equal(twin.noise, bottleneck.noise)
    assert "noise" not in twin.state_dict()


def test_a_frozen_bottleneck_draws_in_training_steps_too() -> None:
    bottleneck, given = make(), features()
    assert not bottleneck.training
    outputs = []
    for seed in (1, 1, 2):
        with bottleneck.drawing(step_generator(seed)):
            outputs.append(bottleneck(given).values)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert bottleneck.train()(given).sample_dim


def test_padding_is_not_seen() -> None:
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 4:] = mask[3, 1:] = False
    for training in (False, True):
        bottleneck = make()
        given = features(mask=mask)
        other = Features(given.pooled, given.tokens.masked_fill(~mask.unsqueeze(-1), 1e3), mask)
        twin = copy.deepcopy(bottleneck)
        outputs = []
        for each, seen in ((bottleneck, given), (twin, other)):
            each.train(training)
            with each.drawing(step_generator(0)):
                outputs.append(each(seen))
        torch.testing.assert_close(outputs[1].values, outputs[0].values)
        torch.testing.assert_close(twin.norm.running_var, bottleneck.norm.running_var)
    cut = make()
    short = cut(Features(given.pooled[:1], given.tokens[:1, :4]))
    whole = make_like(cut)(Features(given.pooled[:1], given.tokens[:1], mask[:1]))
    torch.testing.assert_close(whole.values, short.values)
    torch.testing.assert_close(whole.uncertainty, short.uncertainty)


def make_like(other: ProbabilisticBottleneck) -> ProbabilisticBottleneck:
    twin = make()
    twin.load_state_dict(other.state_dict())
    return twin


# ---------------------------------------------------------------- corrections


@pytest.mark.parametrize("inference", ["mean", "sample"])
def test_a_correction_is_an_anchor_without_variance(inference: Any) -> None:
    bottleneck = make(inference=inference)
    output = bottleneck(features(1))
    anchors = torch.nn.functional.normalize(bottleneck.anchors, dim=-1)
    mask = torch.tensor([[True, True, False]])
    fixed = bottleneck.intervene(output, Intervention(mask, torch.tensor([[1.0, 0.3, 1.0]])))
    first, second, third = fixed.values.unflatten(-1, (3, D)).unbind(-2)
    torch.testing.assert_close(first, anchors[1, 0].expand_as(first))
    torch.testing.assert_close(second, (0.3 * anchors[1, 1] + 0.7 * anchors[0, 1]).expand_as(second))
    assert torch.equal(third, output.values[..., 2 * D :])
    torch.testing.assert_close(fixed.probs[0], torch.cat([torch.tensor([1.0, 0.3]), output.probs[0, 2:]]))
    assert fixed.uncertainty[0, :2].tolist() == [0.0, 0.0]
    assert fixed.uncertainty[0, 2] == output.uncertainty[0, 2] > 0
    assert fixed.extras["log_variance"].exp()[0, :2].eq(0).all()
    assert output.extras["log_variance"].isfinite().all()
    assert fixed.sample_dim == output.sample_dim
    # on the logit scale
    logit = torch.tensor([[0.0, -0.8473, 0.0]])
    scaled = bottleneck.intervene(output, Intervention(mask, torch.tensor([[0.5, 0.5, 1.0]]), logit))
    torch.testing.assert_close(scaled.values[..., D : 2 * D], second, rtol=1e-4, atol=1e-4)


def test_nan_takes_a_concept_out_and_stays_out() -> None:
    bottleneck = make()
    output = bottleneck(features())
    mask = torch.tensor([[True, False, False]]).expand(B, 3)
    gone = bottleneck.intervene(output, Intervention(mask, torch.full((B, 3), torch.nan)))
    assert gone.values[:, :D].eq(0).all()
    assert torch.equal(gone.probs, output.probs)
    assert torch.equal(gone.uncertainty, output.uncertainty)
    assert gone.extras["log_variance"][:, 0].isneginf().all()
    both = bottleneck.intervene(gone, Intervention(mask.roll(1, 1), torch.ones(B, 3)))
    assert both.values[:, :D].eq(0).all()
    assert both.values[:, D : 2 * D].ne(0).all()
    same_again = bottleneck.intervene(output, Intervention(torch.zeros(B, 3, dtype=torch.bool), torch.ones(B, 3)))
    assert torch.equal(same_again.values, output.values)
    assert torch.equal(same_again.uncertainty, output.uncertainty)


def test_corrected_and_predicted_concepts_meet_the_same_temperature() -> None:
    model = image_model()
    prediction = model(batch_of())
    ones = torch.ones(6, 3, dtype=torch.bool)
    fixed = model.intervene(prediction, Intervention(ones, torch.ones(6, 3)))
    anchors = torch.nn.functional.normalize(model.bottleneck.anchors[1], dim=-1).flatten()
    # a prediction that says what the person says
    told = prediction.concepts.replace(values=anchors.expand(6, -1))
    torch.testing.assert_close(fixed.logits, model.head(told))
    with torch.no_grad():
        model.head.scale.mul_(3.0)
    again = model.intervene(prediction, Intervention(ones, torch.ones(6, 3)))
    torch.testing.assert_close(again.logits, 3.0 * fixed.logits)


def test_each_sample_drawn_may_be_corrected_by_itself() -> None:
    bottleneck, given = make(), features()
    concepts = torch.ones(B, 3)
    with bottleneck.drawing(step_generator(0)):
        output = bottleneck(given)
        mask = bottleneck.training_mask(concepts, step_generator(1))
        mixed = bottleneck.intervene(output, Intervention(mask, concepts))
    assert mask.shape == (8, B, 3)
    anchors = torch.nn.functional.normalize(bottleneck.anchors[1], dim=-1)
    for s in range(8):
        for i in range(B):
            for k in range(3):
                own = slice(k * D, (k + 1) * D)
                expected = anchors[k] if mask[s, i, k] else output.values[s, i, own]
                assert torch.equal(mixed.values[s, i, own], expected)
    whole = mask.all(0)
    assert torch.equal(mixed.probs[~whole], output.probs[~whole])
    everywhere = bottleneck.intervene(output, Intervention(torch.ones_like(mask), concepts))
    assert everywhere.probs.eq(1).all()
    assert everywhere.uncertainty.eq(0).all()
    # what was predicted without samples has them afterwards
    means = bottleneck.intervene(bottleneck(given), Intervention(mask, concepts))
    assert means.sample_dim
    assert means.values.shape == mixed.values.shape


def test_randint_draws_anew_for_each_sample_or_once_a_batch_or_never() -> None:
    concepts = torch.zeros(400, 3)
    drawn = make().training_mask(concepts, step_generator(0)).float()
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    # neither the draws of an input nor its concepts hang together
    for dim in (0, 1, 2):
        assert 0.1 < drawn.std(dim).mean() < 0.6
    assert abs((drawn[0] - 0.5).mul(drawn[1] - 0.5).mean()) < 0.02
    rare = make(randint=0.1).training_mask(concepts, step_generator(0)).float()
    assert rare.mean() == pytest.approx(0.1, abs=0.02)
    once = make(randint_scope="batch").training_mask(concepts, step_generator(0))
    assert once.shape == (400, 3)
    assert (once == once[0]).all()
    assert make(randint=0.0).training_mask(concepts, step_generator(0)) is None


def test_unknown_concepts_leave_the_gradients_of_anchors_finite() -> None:
    bottleneck = make().train()
    concepts = torch.tensor([[1.0, torch.nan, 0.0]]).repeat(B, 1)
    with bottleneck.drawing(step_generator(0)):
        output = bottleneck(features())
        mask = bottleneck.training_mask(concepts, step_generator(1)) & ~concepts.isnan()
        bottleneck.intervene(output, Intervention(mask, concepts)).values.sum().backward()
    assert bottleneck.anchors.grad.isfinite().all()
    assert bottleneck.anchors.grad[1, 0].ne(0).any()
    assert bottleneck.anchors.grad[:, 1].eq(0).all()


def test_correcting_the_most_uncertain_concepts_first_leaves_no_uncertainty_of_the_label() -> None:
    model = token_model(ProbabilisticBottleneck(D))
    bottleneck, output = model.bottleneck, model({"tokens": torch.randn(9, N, WIDTH)}).concepts
    assert output.can_join
    joined = ConceptOutput.cat([output, output])
    assert joined.uncertainty.shape == (18, 3)
    mask = torch.zeros(9, 3, dtype=torch.bool)
    before = model.head.uncertainty(output)
    order = output.uncertainty.argsort(1, descending=True)
    for step in range(3):
        mask[torch.arange(9), order[:, step]] = True
        fixed = bottleneck.intervene(output, Intervention(mask, torch.ones(9, 3)))
        after = model.head.uncertainty(fixed)
        assert (after <= before).all()
        before = after
    assert after.eq(0).all()


@pytest.mark.parametrize("inference", ["mean", "sample"])
@pytest.mark.parametrize("policy", ["ectp", "eudtp", "lcp"])
def test_the_engine_asks_about_every_concept_until_all_are_anchors(policy: str, inference: Any) -> None:
    model = token_model(ProbabilisticBottleneck(D, samples=8, inference=inference))
    with torch.no_grad():
        prediction = model({"tokens": torch.randn(9, N, WIDTH)})
    concepts, label = (torch.rand(9, 3) < 0.5).float(), torch.randint(4, (9,))
    told = Person(CONCEPTS).answer(concepts, label, None, Randomness(0, "person", torch.arange(9)))
    steps = planned(engine_of(model), answered(prediction, told, label), Policy.make(policy))
    assert steps.sort(1).values.tolist() == [[1, 2, 3]] * 9
    fixed = model.intervene(prediction, Intervention(torch.ones(9, 3, dtype=torch.bool), concepts))
    anchors = torch.nn.functional.normalize(model.bottleneck.anchors, dim=-1)
    read = torch.where(concepts.bool().unsqueeze(-1), anchors[1], anchors[0]).flatten(1)
    torch.testing.assert_close(fixed.concepts.values, read.expand_as(fixed.concepts.values))


def token_model(bottleneck: ProbabilisticBottleneck) -> CBMModule:
    torch.manual_seed(0)
    return CBMModule(Identity(WIDTH, tokens=True), bottleneck, concepts=CONCEPTS, num_classes=4).eval()


# ---------------------------------------------------------------- maps


def test_attention_is_a_hint_and_no_exact_map() -> None:
    model = image_model()
    batch = batch_of()
    output = model(batch).concepts
    assert output.maps.shape == (6, 3, 8, 8)
    torch.testing.assert_close(output.maps.flatten(2).sum(-1), torch.ones(6, 3))
    assert model.bottleneck.concept_maps(output) is None
    with pytest.raises(ValueError, match="no exact concept maps"):
        concept_maps(model, batch["image"], "exact")
    assert concept_maps(model, batch["image"], "grad_cam").shape == (6, 3, 16, 16)
    assert make()(features(mask=torch.ones(B, N, dtype=torch.bool))).maps is None


# ---------------------------------------------------------------- training


def image_model(bottleneck: Any = None, **options: Any) -> CBMModule:
    made = toy_model(bottleneck or ProbabilisticBottleneck(D, samples=8), ToyConv, **{"lr": 0.02, **options})
    return made.eval()


def losses_of(model: CBMModule, output: ConceptOutput, batch: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name.removeprefix("loss_"): loss for name, loss in model.losses(model.head(output), output, batch)[1].items()
    }


def test_its_own_head_classifies_by_distance_and_another_may_read_it() -> None:
    assert isinstance(image_model().head, PrototypeHead)
    model = image_model(head=LinearHead())
    assert model(batch_of()).logits.shape == (6, 3)


def test_the_phases_of_the_paper_train_what_they_should_and_nothing_drifts() -> None:
    model = image_model(phases=PHASES, loss_weights={"kl": 5e-5})
    recorder = Recorder()
    data = ToyImages(n=24, change=lambda rows: {**rows, "concepts": with_unknown(rows["concepts"])})
    quiet_trainer(max_epochs=5, callbacks=[recorder]).fit(model, data)
    assert recorder.phases == ["warm_up", *["concepts"] * 2, *["labels"] * 2]
    start, warm, first, second, third, last = recorder.weights
    assert same(part_of(start, "backbone"), part_of(warm, "backbone"))
    assert same(part_of(start, "head"), part_of(second, "head"))
    moved = [name for name, tensor in part_of(start, "bottleneck").items() if not torch.equal(tensor, second[name])]
    assert set(moved) == {name for name in part_of(start, "bottleneck") if name.startswith("bottleneck.")}
    assert not same(part_of(warm, "backbone"), part_of(first, "backbone"))
    # the running statistics of frozen parts stand still
    for part in ("backbone", "bottleneck"):
        assert same(part_of(second, part), part_of(last, part))
    assert not same(part_of(second, "head"), part_of(third, "head"))
    assert all(tensor.isfinite().all() for tensor in last.values() if tensor.is_floating_point())


def with_unknown(concepts: Tensor) -> Tensor:
    rows, columns = concepts.shape
    return concepts.masked_fill(torch.arange(rows * columns).view(rows, columns) % 5 == 0, torch.nan)


def test_a_concept_is_uncertain_where_its_annotation_is_a_coin_toss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, WIDTH, generator=generator)
    tossed = x[:, 3:6] > 0.5  # another direction says where
    concepts = torch.where(tossed, (torch.rand(512, 3, generator=generator) < 0.5).float(), (x[:, :3] > 0).float())
    bottleneck = ProbabilisticBottleneck(8, samples=8)
    bottleneck.build(FeatureDims(WIDTH, WIDTH), CONCEPTS, num_classes=2)
    given = Features(x, x.unsqueeze(1))
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=0.02)
    for step in range(150):
        with bottleneck.drawing(step_generator(step)):
            output = bottleneck(given)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(output.logits, concepts).backward()
        optimizer.step()
    uncertainty = bottleneck.eval()(given).uncertainty
    found = [binary_auroc(uncertainty[:, k], tossed[:, k].long()) for k in range(3)]
    assert torch.stack(found).mean() > 0.75


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_a_joint_step_reaches_every_parameter(task: Any) -> None:
    batch = batch_of()
    label = {
        "multiclass": batch["label"],
        "binary": batch["label"].clamp(max=1),
        "multilabel": batch["concepts"][:, :2],
    }
    model = image_model(num_classes=3 if task == "multiclass" else 2, class_names=None, task=task)
    rows = DataLoader([{**batch, "label": label[task]}], batch_size=None)
    found: dict[str, bool] = {}
    model.on_after_backward = lambda: found.update(  # type: ignore[method-assign]
        {name: bool(p.grad is not None and p.grad.ne(0).any()) for name, p in model.named_parameters()}
    )
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(model.train(), rows, rows)
    assert all(found.values()), [name for name, reached in found.items() if not reached]


def test_training_learns_and_a_file_brings_everything_back(tmp_path: Path) -> None:
    model = image_model(phases=PHASES, loss_weights={"kl": 5e-5})
    data = ToyImages(n=240, n_eval=60, batch_size=24)
    before = quiet_trainer().test(model, data, verbose=False)[0]
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(model, data)
    after = trainer.test(model, data, verbose=False)[0]
    assert after["test/loss_concept"] < before["test/loss_concept"]
    assert after["test/concept_uncertainty"] > 0
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = CBMModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert quiet_trainer().test(restored, data, verbose=False)[0] == after
    answers = quiet_trainer().predict(restored, data.test_dataloader())[0]
    assert answers["concept_uncertainty"].shape == (24, 3)
    assert answers["label_uncertainty"].shape == (24,)
    assert (answers["label_uncertainty"] > 0).all()


def test_mixed_precision_keeps_distances_and_variances_in_single() -> None:
    bottleneck, given = make(), features()
    expected = bottleneck(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = bottleneck(given)
    assert {tensor.dtype for tensor in (output.logits, output.values, output.uncertainty)} == {torch.float32}
    torch.testing.assert_close(output.probs, expected.probs, rtol=0.1, atol=0.1)
    mask = torch.ones(B, N, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded = bottleneck(Features(given.pooled, given.tokens, mask))
    torch.testing.assert_close(padded.probs, output.probs, rtol=0.02, atol=0.02)
    model = image_model()
    quiet_trainer(max_steps=2, precision="bf16-mixed").fit(model, ToyImages())
    half = bottleneck.bfloat16()(Features(given.pooled.bfloat16(), given.tokens.bfloat16()))
    assert half.probs.isfinite().all()


@pytest.mark.parametrize("way", ["compile", "export"])
def test_the_prediction_is_one_graph(way: str) -> None:
    bottleneck, given = make(inference="sample" if way == "compile" else "mean"), features()
    head = PrototypeHead(6)
    head.build(FeatureDims(WIDTH, WIDTH), bottleneck.layout, 3, "multiclass")

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottleneck, self.head = bottleneck, head

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            output = self.bottleneck(Features(tokens.mean(1), tokens, grid=(2, 3)))
            return output.probs, self.head(output)

    whole = Whole().eval()
    expected = whole(given.tokens)
    made = (
        torch.compile(whole, backend="eager", fullgraph=True)
        if way == "compile"
        else torch.export.export(whole, (given.tokens,)).module()
    )
    for found, answer in zip(made(given.tokens), expected, strict=True):
        torch.testing.assert_close(found, answer)


# ---------------------------------------------------------------- bad input


def test_bad_options_name_the_field() -> None:
    for field, value in {"embedding_size": 1, "samples": 0, "inference": "mode", "scale": 0.0, "randint": 2.0}.items():
        with pytest.raises(ValueError, match=f"^{field}:"):
            ProbabilisticBottleneck(**{field: value})
    with pytest.raises(ValueError, match="^scale:"):
        ProbabilisticBottleneck(scale=float("nan"))


def test_what_cannot_be_built_or_read_is_refused() -> None:
    with pytest.raises(ValueError, match="reads tokens, and this backbone has none"):
        ProbabilisticBottleneck().build(FeatureDims(5), CONCEPTS, 2)
    with pytest.raises(ValueError, match="'size'.* real-valued"):
        ProbabilisticBottleneck().build(FeatureDims(5, 5), ConceptSet(["size"], kinds="real"), 2)
    with pytest.raises(ValueError, match="^tokens:"):
        make()(Features(torch.randn(B, WIDTH)))
