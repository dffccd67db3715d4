from __future__ import annotations

import pytest
import torch

from cbm_lightning.bottlenecks import EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LinearHead, MLPHead, PassThroughHead, ResidualHead
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, ValueLayout

CONCEPTS, DIMS = ConceptSet(["a", "b", "c"]), FeatureDims(5)
BOTTLENECKS = {
    "sigmoid": LinearBottleneck("sigmoid"),
    "logits": LinearBottleneck("logits"),
    "hybrid": LinearBottleneck("relu", extra_dims=2),
    "embedding": EmbeddingBottleneck(4),
}


def output_of(name: str, batch: int = 6) -> tuple[ConceptOutput, ValueLayout]:
    bottleneck = BOTTLENECKS[name]
    bottleneck.build(DIMS, CONCEPTS, num_classes=4)
    return bottleneck(Features(torch.randn(batch, 5))), bottleneck.layout


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize(
    "head", [LinearHead(), LinearHead(bias=False), ResidualHead()], ids=["linear", "no bias", "residual"]
)
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_contributions_sum_to_the_logits_exactly(name: str, head, task: str) -> None:
    output, layout = output_of(name)
    head.build(DIMS, layout, num_classes=4, task=task)
    if isinstance(head, ResidualHead):
        torch.nn.init.normal_(head.side.weight)
    account = head.contributions(output)
    assert account.concepts.shape == (6, 1 if task == "binary" else 4, 3)
    torch.testing.assert_close(account.concepts.sum(-1) + sum(account.other.values()), head(output))


def test_an_mlp_claims_no_contributions() -> None:
    output, layout = output_of("sigmoid")
    head = MLPHead([7], dropout=0.1)
    head.build(DIMS, layout, 4, "multiclass")
    assert head(output).shape == (6, 4)
    assert head.contributions(output) is None
    assert head.concept_weight() is None


def test_the_residual_starts_silent_and_reports_its_share() -> None:
    output, layout = output_of("sigmoid")
    head = ResidualHead()
    head.build(DIMS, layout, 4, "multiclass")
    torch.testing.assert_close(head(output), head.head(output))
    assert head.diagnostics(output)["residual_share"] == 0
    torch.nn.init.constant_(head.side.weight, 3.0)  # the same for every class: decides nothing
    assert head.diagnostics(output)["residual_share"] < 1e-10
    torch.nn.init.normal_(head.side.weight, std=100.0)
    assert head.diagnostics(output)["residual_share"] > 0.9


def test_the_residual_can_be_dropped_a_sample() -> None:
    output, layout = output_of("sigmoid", batch=400)
    head = ResidualHead(dropout=0.5)
    head.build(DIMS, layout, 4, "multiclass")
    torch.nn.init.normal_(head.side.weight)
    silent = (head(output) == head.head(output)).all(1).float().mean()
    assert 0.4 < silent < 0.6
    assert not (head.eval()(output) == head.head(output)).all(1).any()


def test_samples_are_averaged_in_probability_space() -> None:
    values = torch.randn(50, 6, 3) * 5  # [S, B, V]
    features = Features(torch.randn(6, 5))
    for task in ("multiclass", "multilabel", "binary"):
        head = LinearHead()
        head.build(DIMS, ValueLayout(3), 4, task)
        output = ConceptOutput(features, values[0], values[0], values, sample_dim=True)
        squash = (lambda z: z.softmax(-1)) if task == "multiclass" else torch.sigmoid
        torch.testing.assert_close(squash(head(output)), squash(head.linear(values)).mean(0))


def test_time_is_averaged_over_real_steps_only() -> None:
    values = torch.randn(2, 4, 3)  # [B, T, V]
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    head = LinearHead()
    head.build(DIMS, ValueLayout(3), 4, "multiclass")
    output = ConceptOutput(Features(torch.randn(2, 5), mask=mask), values[:, 0], values[:, 0], values, time_dim=True)
    torch.testing.assert_close(head(output)[0], head.linear(values[0, :2]).mean(0))
    torch.testing.assert_close(head(output)[1], head.linear(values[1]).mean(0))


def test_a_bottleneck_that_owns_the_label_is_passed_through() -> None:
    output, layout = output_of("sigmoid")
    head = LinearHead()
    head.build(DIMS, layout, 4, "multiclass")
    own = torch.randn(6, 4)
    assert head(output.replace(label_logits=own)) is own
    assert head.contributions(output.replace(label_logits=own)) is None


def test_bad_options_name_the_field() -> None:
    with pytest.raises(ValueError, match="^hidden:"):
        MLPHead([])
    with pytest.raises(ValueError, match="^dropout:"):
        MLPHead([3], dropout=1.0)
    with pytest.raises(ValueError, match="^dropout:"):
        ResidualHead(dropout=-0.1)


def test_contributions_of_wide_concepts_add_up() -> None:
    head = LinearHead()
    head.build(FeatureDims(5), ValueLayout(3, 4, 2), 6, "multiclass")
    values = torch.randn(7, 14)
    output = ConceptOutput(Features(torch.zeros(7, 5)), values[:, :3], values[:, :3], values)
    account = head.contributions(output)
    torch.testing.assert_close(account.concepts.sum(-1) + sum(account.other.values()), head(output))


def test_two_class_logits_of_a_binary_label_become_one() -> None:
    head = PassThroughHead()
    head.build(FeatureDims(4), ValueLayout(2), num_classes=2, task="binary")
    zeros = torch.zeros(3, 2)
    own = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])
    output = ConceptOutput(Features(zeros), zeros, zeros, zeros, label_logits=own)
    assert head(output).flatten().tolist() == [1.0, -3.0, 0.0]
    assert list(head.parameters()) == []
    with pytest.raises(ValueError, match="the bottleneck predicts no label_logits"):
        head(output.replace(label_logits=None))
