from __future__ import annotations

import pytest
import torch
from recorder import make, record
from toy import WIDTH

from cbm_lightning.bottlenecks import LinearBottleneck
from cbm_lightning.callbacks import SparsitySchedule
from cbm_lightning.heads import NormalizedHead
from cbm_lightning.sparsity.nec import nec
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, ValueLayout


def output_of(values: torch.Tensor, **axes: bool) -> ConceptOutput:
    batch = 6
    scores = torch.zeros(batch, 3)
    return ConceptOutput(Features(torch.zeros(batch, 5)), scores, scores, values, **axes)


def head_of(layout: ValueLayout, task: str = "multiclass", bias: bool = True) -> NormalizedHead:
    head = NormalizedHead(bias)
    head.build(FeatureDims(5), layout, num_classes=4, task=task)
    return head


def test_it_is_a_layer_norm_and_a_linear_map() -> None:
    head, values = head_of(ValueLayout(3)), 4 * torch.randn(6, 3) + 2
    expected = []
    for row in values:
        deviation = ((row - row.mean()) ** 2).mean().sqrt()
        expected.append(head.linear.weight @ ((row - row.mean()) / deviation) + head.linear.bias)
    torch.testing.assert_close(head(output_of(values)), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_scale_and_shift_of_the_layer_norm_would_change_nothing() -> None:
    """The official head, with both, as ours with other weights."""
    official = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 4))
    torch.nn.init.normal_(official[0].weight)
    torch.nn.init.normal_(official[0].bias)
    head, values = head_of(ValueLayout(3)), torch.randn(6, 3)
    with torch.no_grad():
        head.linear.weight.copy_(official[1].weight * official[0].weight)
        head.linear.bias.copy_(official[1].bias + official[1].weight @ official[0].bias)
    torch.testing.assert_close(head(output_of(values)), official(values))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("layout", [ValueLayout(3), ValueLayout(3, 4), ValueLayout(3, 2, 2)], ids=str)
def test_contributions_sum_to_the_logits_exactly(layout: ValueLayout, task: str, bias: bool) -> None:
    head, output = head_of(layout, task, bias), output_of(3 * torch.randn(6, layout.size) + 1)
    account = head.contributions(output)
    assert account.concepts.shape == (6, 1 if task == "binary" else 4, 3)
    assert ("bias" in account.other, "unsupervised" in account.other) == (bias, layout.extra > 0)
    torch.testing.assert_close(account.concepts.sum(-1) + sum(account.other.values()), head(output))


def test_axes_of_samples_and_time_have_logits_but_no_contributions() -> None:
    head = head_of(ValueLayout(3))
    sampled, timed = output_of(torch.randn(7, 6, 3), sample_dim=True), output_of(torch.randn(6, 5, 3), time_dim=True)
    probs = torch.stack([head(output_of(x)).softmax(-1) for x in sampled.values]).mean(0)
    torch.testing.assert_close(head(sampled).softmax(-1), probs)
    torch.testing.assert_close(head(timed), torch.stack([head(output_of(x)) for x in timed.values.unbind(1)]).mean(0))
    assert head.contributions(sampled) is None
    assert head.contributions(timed) is None
    assert head.contributions(output_of(torch.randn(6, 3)).replace(label_logits=torch.zeros(6, 4))) is None


def test_it_makes_no_claim_to_be_linear() -> None:
    head = head_of(ValueLayout(3))
    assert head.concept_weight() is None
    assert head.linear_map() is None
    with pytest.raises(ValueError, match="NormalizedHead"):
        head.check_solver({})


def test_a_single_number_is_refused() -> None:
    with pytest.raises(ValueError, match="use LinearHead"):
        head_of(ValueLayout(1))


def test_a_schedule_leaves_few_concepts_a_class() -> None:
    model = make(LinearBottleneck("logits"), head=NormalizedHead())
    record(model, max_epochs=3, callbacks=[SparsitySchedule(mode="cubic", target_nec=2, begin=0.1, end=0.8)])
    assert nec(model.head.linear.weight) == 2
    image = torch.randn(5, WIDTH)
    account = model.eval().head.contributions(model(image).concepts)
    assert int((account.concepts != 0).any(0).sum()) == 2 * 3
