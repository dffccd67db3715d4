"""The energy-based bottleneck: its energies, losses, descent and corrections."""

from __future__ import annotations

import pytest
import torch
from bottlenecks.plain_ecbm import (
    CLASSES,
    CONCEPTS,
    GROUPED,
    SIZE,
    WIDTH,
    inputs,
    joint_energy,
    model_of,
    one_hot_energies,
    one_hot_joint,
    told,
    total_energy,
)
from torch import Tensor

from cbm_lightning import CBMModule, LinearHead
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import EnergyBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import PassThroughHead
from cbm_lightning.interventions.subject import Subject
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import FeatureDims, Features, Intervention, LossContext


@pytest.fixture
def model() -> CBMModule:
    return model_of()


def losses_of(model: CBMModule, concepts: Tensor, label: Tensor, seed: int | None = None) -> dict[str, Tensor]:
    """The losses of the bottleneck, in a training step if there is a seed."""
    bottleneck = model.bottleneck
    context = LossContext(model.concept_loss, model.label_loss, model.head, torch.zeros(0))
    output = bottleneck(Features(inputs(len(concepts))))
    batch = {"concepts": concepts, "label": label}
    if seed is None:
        return bottleneck.losses(output, batch, context)
    with bottleneck.drawing(step_generator(seed)):
        return bottleneck.losses(output, batch, context)


# ---------------------------------------------------------------- energies and losses


def test_training_predicts_by_the_energies_of_the_paper(model: CBMModule) -> None:
    x = inputs()
    output = model.bottleneck(Features(x))
    classes, concepts = one_hot_energies(model.bottleneck, x)
    torch.testing.assert_close(output.label_logits, -classes)
    # the second row of an embedding means present in every energy
    torch.testing.assert_close(output.logits, concepts[..., 0] - concepts[..., 1])
    torch.testing.assert_close(output.probs, (-concepts).softmax(-1)[..., 1])
    p = torch.rand(6, 3)
    torch.testing.assert_close(model.bottleneck.joint_energies(p), one_hot_joint(model.bottleneck, p))


def test_the_losses_are_energies_of_the_truth_plus_logsumexp() -> None:
    model = model_of()
    model.concept_loss = ConceptLoss("sum")
    model.concept_loss.build(CONCEPTS)
    x, label = inputs(), torch.arange(6) % CLASSES
    truth = (torch.rand(6, 3) < 0.5).float()
    found = losses_of(model, truth, label)
    classes, concepts = one_hot_energies(model.bottleneck, x)
    joint = one_hot_joint(model.bottleneck, truth)
    of_truth = concepts.gather(2, truth.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found["concept"], (of_truth + (-concepts).logsumexp(-1)).mean(0).sum())
    rows = torch.arange(6)
    torch.testing.assert_close(found["coherence"], (joint[rows, label] + (-joint).logsumexp(-1)).mean())
    label_loss = model.label_loss(model.head(model.bottleneck(Features(x))), label)
    torch.testing.assert_close(label_loss, (classes[rows, label] + (-classes).logsumexp(-1)).mean())


def test_a_training_step_flips_the_same_concepts_in_some_samples() -> None:
    concepts = ConceptSet([str(k) for k in range(11)])
    bottleneck = EnergyBottleneck(SIZE, flip_samples=0.3, flip_concepts=0.15)
    flips = bottleneck._flips(torch.zeros(9, len(concepts)), step_generator(0))
    assert flips.sum(1).tolist().count(2) == 3  # rounded up, as the official code counts
    assert int(flips.any(0).sum()) == 2
    again, other = (bottleneck._flips(torch.zeros(9, 11), step_generator(seed)) for seed in (0, 1))
    assert torch.equal(flips, again)
    assert not torch.equal(flips, other)
    assert not EnergyBottleneck(SIZE, flip_samples=0.0)._flips(torch.zeros(9, 11), step_generator(0)).any()


def test_flips_reach_coherence_in_training_alone_and_never_the_batch(model: CBMModule) -> None:
    truth, label = torch.tensor([[1, 0, 1]] * 6), torch.arange(6) % CLASSES
    before = truth.clone()
    plain, drawn = losses_of(model, truth.float(), label), losses_of(model, truth.float(), label, seed=3)
    losses_of(model, truth, label, seed=3)  # whole numbers, which the official code overwrites
    assert torch.equal(truth, before)
    torch.testing.assert_close(drawn["concept"], plain["concept"])
    flips = model.bottleneck._flips(truth.float(), step_generator(3))
    expected = one_hot_joint(model.bottleneck, torch.where(flips, 1.0 - truth, truth.float()))
    torch.testing.assert_close(drawn["coherence"], model.label_loss(-expected, label))
    assert not torch.isclose(drawn["coherence"], plain["coherence"])


def test_predictions_stand_in_for_unknown_annotations_and_soft_ones_mix(model: CBMModule) -> None:
    label = torch.arange(6) % CLASSES
    truth = torch.rand(6, 3)
    truth[:, 1] = torch.nan
    found = losses_of(model, truth, label)
    filled = truth.clone()
    filled[:, 1] = model.bottleneck(Features(inputs())).probs[:, 1].detach()
    expected = model.label_loss(-one_hot_joint(model.bottleneck, filled), label)
    torch.testing.assert_close(found["coherence"], expected)
    (gradient,) = torch.autograd.grad(found["coherence"], model.bottleneck.to_concepts.weight, allow_unused=True)
    assert gradient is None
    assert losses_of(model, torch.full((6, 3), torch.nan), label)["coherence"].isfinite()


def test_association_compares_the_energies_of_each_concept_given_the_rest(model: CBMModule) -> None:
    truth, label = (torch.rand(6, 3) < 0.5).float(), torch.arange(6) % CLASSES
    truth[:, 2] = 0.3  # a soft annotation mixes for the others
    classes = torch.eye(CLASSES)[label]
    logits = torch.empty(6, 3)
    for k in range(3):
        absent, present = truth.clone(), truth.clone()
        absent[:, k], present[:, k] = 0.0, 1.0
        energies = [joint_energy(model.bottleneck, p, classes) for p in (absent, present)]
        logits[:, k] = energies[0] - energies[1]
    torch.testing.assert_close(model.bottleneck.association(truth, label), logits)
    torch.testing.assert_close(losses_of(model, truth, label)["association"], model.concept_loss(logits, truth))
    half = truth.clone()
    half[:, 1] = torch.nan
    filled = torch.where(half.isnan(), model.bottleneck(Features(inputs())).probs.detach(), truth)
    expected = model.concept_loss(model.bottleneck.association(filled, label), half)
    torch.testing.assert_close(losses_of(model, half, label)["association"], expected)
    assert "association" not in losses_of(model_of(associate=False), truth, label)


def test_association_of_a_group_is_a_softmax_over_its_members() -> None:
    model = model_of(GROUPED)
    truth = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    label = torch.tensor([2, 0])
    classes = torch.eye(CLASSES)[label]
    members = [torch.cat([row.expand(2, -1), truth[:, 3:]], 1) for row in torch.eye(3)]
    energies = torch.stack([joint_energy(model.bottleneck, vector, classes) for vector in members], 1)
    found = model.bottleneck.association(truth, label)
    torch.testing.assert_close(found[:, :3].softmax(-1), (-energies).softmax(-1))


def test_association_of_several_labels_adds_their_energies() -> None:
    model = model_of(task="multilabel")
    truth, labels = torch.ones(1, 3), torch.tensor([[1, 0, 1, 0]])
    first, third = (model.bottleneck.association(truth, torch.tensor([y])) for y in (0, 2))
    torch.testing.assert_close(model.bottleneck.association(truth, labels), first + third)


def test_dropout_is_on_the_two_hidden_vectors_of_the_input() -> None:
    bottleneck = model_of(dropout=0.5).bottleneck.train()
    features = Features(torch.ones(1, WIDTH).expand(2000, -1))
    terms = bottleneck.terms(features)
    hidden = (bottleneck.to_class(features.pooled[:1]).relu() * bottleneck.class_weight).detach()
    torch.testing.assert_close(terms.relevance.mean(0), hidden[0], atol=0.25, rtol=0.15)
    live = hidden[0] != 0
    assert (terms.relevance[:, live] == 0).float().mean(0).sub(0.5).abs().max() < 0.1
    torch.testing.assert_close(bottleneck.eval().terms(features).relevance, hidden.expand(2000, -1))


# ---------------------------------------------------------------- prediction


def test_evaluation_ends_at_a_lower_energy_than_training_predicts(model: CBMModule) -> None:
    x = inputs(30)
    start = model.bottleneck(Features(x))
    with torch.no_grad():
        logits, output = model({"embedding": x})
        weights = model.bottleneck.weights
        classes = start.label_logits.softmax(-1)
        before = total_energy(model.bottleneck, x, start.probs, classes, weights)
        after = total_energy(model.bottleneck, x, output.probs, classes, weights)
    assert (after < before).float().mean() > 0.9
    torch.testing.assert_close(output.values, output.probs)
    torch.testing.assert_close(output.probs, output.logits.sigmoid())
    own, joint = one_hot_energies(model.bottleneck, x)[0], one_hot_joint(model.bottleneck, output.probs)
    torch.testing.assert_close(logits, -(own + 0.01 * joint) / 1.01)


def test_the_class_read_off_the_energies_is_the_one_of_lowest_total_energy(model: CBMModule) -> None:
    x = inputs()
    with torch.no_grad():
        logits, output = model({"embedding": x})
        each = torch.stack(
            [
                total_energy(model.bottleneck, x, output.probs, row.expand(6, -1), (1.0, 1.0, 0.01))
                for row in torch.eye(CLASSES)
            ],
            1,
        )
    assert torch.equal(logits.argmax(-1), each.argmin(-1))


@pytest.mark.parametrize("start", ["amortised", "zero"])
def test_a_sample_does_not_depend_on_the_others(start: str) -> None:
    model = model_of(start=start)
    x = inputs(5)
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[2:, 0] = True
    with torch.inference_mode():
        together = model({"embedding": x})
        fixed = model.intervene(together, Intervention(mask, torch.ones(5, 3)))
        for i in range(5):
            alone = model({"embedding": x[i : i + 1]})
            torch.testing.assert_close(alone.logits, together.logits[i : i + 1], atol=1e-5, rtol=1e-5)
            one = model.intervene(alone, Intervention(mask[i : i + 1], torch.ones(1, 3)))
            torch.testing.assert_close(one.logits, fixed.logits[i : i + 1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.concepts.probs, fixed.concepts.probs[i : i + 1], atol=1e-5, rtol=1e-4)


def test_starts_and_steps_are_options() -> None:
    x = {"embedding": inputs()}
    with torch.no_grad():
        still = model_of(steps=0)(x)
        torch.testing.assert_close(still.concepts.probs, model_of().bottleneck(Features(x["embedding"])).probs)
        zero = model_of(start="zero", steps=3)(x).concepts.logits
        assert zero.abs().max() < 0.61  # three steps of at most 0.2 from 0
        other = model_of(steps=3)(x).concepts.logits
        assert not torch.allclose(zero, other)
        slow = model_of(start="zero", steps=3, step_size=0.01)(x).concepts.logits
        assert slow.abs().max() < 0.061
        joint = model_of(weights=(0.0, 0.0, 1.0))
        logits, output = joint(x)
        torch.testing.assert_close(logits, -one_hot_joint(joint.bottleneck, output.probs))


def test_lightning_evaluates_in_inference_mode_and_parameters_get_no_gradient(model: CBMModule) -> None:
    with torch.inference_mode():
        inferred = model.intervene(model({"embedding": inputs()}), told(c0=1.0))
    graded = model.intervene(model({"embedding": inputs()}), told(c0=1.0))
    torch.testing.assert_close(inferred.logits, graded.logits)
    assert all(weight.grad is None for weight in model.parameters())


def test_gradients_of_predicted_concepts_reach_the_features(model: CBMModule) -> None:
    x = inputs().requires_grad_()
    refined = model({"embedding": x}).concepts
    (found,) = torch.autograd.grad(refined.logits[:, 1].sum(), x)
    (expected,) = torch.autograd.grad(model.bottleneck(Features(x)).logits[:, 1].sum(), x)
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0


def test_mixed_precision_leaves_the_energies_in_single_precision(model: CBMModule) -> None:
    x = {"embedding": inputs()}
    with torch.no_grad():
        full = model.intervene(model(x), told(c0=1.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.intervene(model(x), told(c0=1.0))
    assert torch.equal(half.logits, full.logits)
    assert torch.equal(half.concepts.probs, full.concepts.probs)


def test_a_model_in_half_precision_shares_groups_too() -> None:
    model = model_of(GROUPED).bfloat16()
    batch = {
        "embedding": inputs().bfloat16(),
        "concepts": torch.eye(4)[[0, 1, 2, 0, 1, 2]],
        "label": torch.arange(6) % 2,
    }
    with torch.no_grad():
        prediction = model(batch)
        fixed = model.intervene(prediction, told(concepts=4, c1=1.0))
        _, losses = model.losses(prediction.logits, prediction.concepts, batch)
    for found in (fixed.logits, fixed.concepts.probs, *losses.values()):
        assert found.isfinite().all()


def test_policies_learn_how_the_label_reacts_to_the_concepts(model: CBMModule) -> None:
    with torch.inference_mode():
        output = model({"embedding": inputs()}).concepts
        found = list(Subject(model).slopes(output))
    values = output.values.clone().requires_grad_()
    for label, (slope, read) in enumerate(found):
        energies = joint_energy(model.bottleneck, values, torch.eye(CLASSES)[label].expand(6, -1))
        (expected,) = torch.autograd.grad(-0.01 / 1.01 * energies.sum(), values)
        torch.testing.assert_close(slope.squeeze(-1), expected)
        torch.testing.assert_close(read.squeeze(-1), output.values)


# ---------------------------------------------------------------- labels and options


def test_several_labels_have_an_energy_each() -> None:
    model = model_of(task="multilabel")
    x = inputs()
    with torch.no_grad():
        logits, output = model({"embedding": x})
        own, joint = one_hot_energies(model.bottleneck, x)[0], one_hot_joint(model.bottleneck, output.probs)
    torch.testing.assert_close(logits, -(own + 0.01 * joint) / 1.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_size": 0}, "embedding_size: expected at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"flip_samples": 1.2}, r"flip_samples: expected a share in \[0, 1\], got 1.2"),
        ({"flip_concepts": -0.1}, r"flip_concepts: expected a share in \[0, 1\], got -0.1"),
        ({"steps": -1}, "steps: expected 0 or more, got -1"),
        ({"step_size": 0.0}, "step_size: expected a positive number, got 0.0"),
        ({"start": "best"}, "start: expected 'amortised' or 'zero', got 'best'"),
        ({"weights": (1.0, 1.0)}, "weights: expected three numbers of at least 0"),
        ({"weights": (-1.0, 1.0, 1.0)}, "weights: expected three numbers of at least 0"),
        ({"correction_weights": (0.0, 1.0, 0.0)}, "correction_weights: .* the first or the last above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyBottleneck(**options)


def test_real_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"concepts \['size'\] are real-valued"):
        EnergyBottleneck().build(FeatureDims(5), ConceptSet(["size"], kinds="real"), 2)


def test_it_brings_its_head(model: CBMModule) -> None:
    assert isinstance(model.head, PassThroughHead)
    with pytest.raises(ValueError, match="EnergyBottleneck predicts the label itself"):
        CBMModule(Identity(WIDTH), EnergyBottleneck(SIZE), LinearHead(), concepts=CONCEPTS, num_classes=3)
