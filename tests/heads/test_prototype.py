from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbm_lightning.heads import PrototypeHead
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, ValueLayout

DIMS = FeatureDims(5)
TASKS = ["multiclass", "binary", "multilabel"]


def make(hidden: int = 6, task="multiclass", extra: int = 0) -> PrototypeHead:
    head = PrototypeHead(hidden, scale=3.0)
    head.build(DIMS, ValueLayout(3, 4, extra), 2 if task == "binary" else 4, task)
    return head.eval()


def output_of(values: Tensor, log_variance: Tensor | None = None) -> ConceptOutput:
    batch = values.shape[-2]
    concepts = torch.rand(batch, 3)
    extras = {} if log_variance is None else {"log_variance": log_variance}
    features = Features(torch.zeros(batch, 5))
    return ConceptOutput(features, concepts, concepts, values, sample_dim=values.ndim == 3, extras=extras)


def plain_distance(head: PrototypeHead, values: Tensor, prototype: Tensor) -> Tensor:
    hidden = head.project.weight @ values + head.project.bias
    return ((hidden - prototype) ** 2).mean().sqrt()


@pytest.mark.parametrize("task", TASKS)
def test_logits_are_scaled_distances_to_prototypes(task: str) -> None:
    head, values = make(task=task), torch.randn(5, 12)
    logits = head(output_of(values))
    for i, row in enumerate(values):
        for label in range(logits.shape[1]):
            if task == "multiclass":
                expected = -3.0 * plain_distance(head, row, head.prototypes[0, label])
            else:
                absent, present = (plain_distance(head, row, head.prototypes[j, label]) for j in (0, 1))
                expected = 3.0 * (absent - present)
            torch.testing.assert_close(logits[i, label], expected)


def test_the_number_of_prototypes_follows_from_the_task() -> None:
    shapes = [tuple(make(task=task).prototypes.shape) for task in TASKS]
    assert shapes == [(1, 4, 6), (2, 1, 6), (2, 4, 6)]


def test_the_nearest_prototype_wins_and_the_scale_sharpens() -> None:
    head = make(hidden=12)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(12))
        head.project.bias.zero_()
    output = output_of(head.prototypes[0].detach() + 0.01)
    assert head(output).argmax(1).tolist() == [0, 1, 2, 3]
    before = head(output).softmax(1).amax(1)
    with torch.no_grad():
        head.scale.mul_(2)
    assert (head(output).softmax(1).amax(1) > before).all()


def test_probabilities_of_samples_are_averaged() -> None:
    head, values = make(), torch.randn(50, 5, 12)
    mean = torch.stack([head(output_of(sample)).softmax(-1) for sample in values]).mean(0)
    logits = head(output_of(values))
    torch.testing.assert_close(logits.softmax(-1), mean)
    label = torch.randint(4, (5,))
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, label), -mean[torch.arange(5), label].log().mean()
    )


def test_on_a_prototype_the_gradient_is_finite() -> None:
    head = make(hidden=12)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(12))
        head.project.bias.zero_()
    values = head.prototypes[0, :1].detach().clone().requires_grad_()
    logits = head(output_of(values))
    assert abs(logits[0, 0].item()) < 1e-2
    logits.sum().backward()
    assert values.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in head.parameters())


@pytest.mark.parametrize("hidden", [6, 12, 20])
def test_uncertainty_is_the_geometric_mean_of_the_singular_values(hidden: int) -> None:
    head, log_variance = make(hidden), torch.randn(5, 3, 4)
    weight = head.project.weight.detach().double()
    for found, row in zip(head.uncertainty(output_of(torch.randn(5, 12), log_variance)), log_variance, strict=True):
        covariance = weight @ torch.diag(row.flatten().double().exp()) @ weight.T
        # in a space of 20 dimensions the embeddings of 12 numbers span 12
        values = torch.linalg.svdvals(covariance)[:12]
        torch.testing.assert_close(found.double(), values.log().mean().exp(), rtol=1e-5, atol=0)


def test_uncertainty_grows_with_each_variance_and_knows_nothing_of_the_mean() -> None:
    head, log_variance = make(), torch.zeros(1, 3, 4)
    calm = head.uncertainty(output_of(torch.randn(1, 12), log_variance))
    torch.testing.assert_close(head.uncertainty(output_of(torch.randn(1, 12), log_variance)), calm)
    torch.testing.assert_close(head.uncertainty(output_of(torch.randn(1, 12), log_variance + 2.0)), calm * 2.718282**2)
    for k in range(3):
        louder = log_variance.clone()
        louder[0, k] += 1.0
        assert head.uncertainty(output_of(torch.randn(1, 12), louder)) > calm


@pytest.mark.parametrize("hidden", [6, 20])
def test_certain_concepts_leave_less_and_at_last_no_uncertainty(hidden: int) -> None:
    head, log_variance = make(hidden), torch.zeros(4, 3, 4)
    for corrected in range(1, 4):
        log_variance[corrected, :corrected] = -torch.inf
    none, one, two, three = head.uncertainty(output_of(torch.randn(4, 12), log_variance)).tolist()
    # one corrected concept of three leaves 8 dimensions, two leave 4
    assert none > 0
    assert 0 < one < none if hidden == 6 else one == 0
    assert two == three == 0


def test_without_variances_there_is_no_uncertainty() -> None:
    assert make().uncertainty(output_of(torch.randn(5, 12))) is None


def test_free_dimensions_have_no_variance() -> None:
    head, log_variance = make(extra=2), torch.randn(5, 3, 4)
    assert head(output_of(torch.randn(5, 14))).shape == (5, 4)
    narrow = make()
    with torch.no_grad():
        narrow.project.weight.copy_(head.project.weight[:, :12])
    torch.testing.assert_close(
        head.uncertainty(output_of(torch.randn(5, 14), log_variance)),
        narrow.uncertainty(output_of(torch.randn(5, 12), log_variance)),
    )


def test_half_precision_around_it_changes_nothing() -> None:
    head, output = make(), output_of(torch.randn(5, 12))
    expected = head(output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(output)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_it_claims_no_linear_account() -> None:
    head = make()
    assert head.concept_weight() is None
    assert head.linear_map() is None
    assert head.contributions(output_of(torch.randn(5, 12))) is None


def test_bad_options_name_the_field() -> None:
    with pytest.raises(ValueError, match="^hidden:"):
        PrototypeHead(0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^scale:"):
            PrototypeHead(scale=scale)
