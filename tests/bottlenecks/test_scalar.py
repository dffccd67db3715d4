from __future__ import annotations

import pytest
import torch

from cbm_lightning.bottlenecks import LinearBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import FeatureDims, Features, Intervention

CONCEPTS = ConceptSet(["a", "b", "c"])


def make(link: str = "sigmoid", concepts: ConceptSet = CONCEPTS, **options: object) -> LinearBottleneck:
    bottleneck = LinearBottleneck(link, **options)
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    return bottleneck


def correct(output, values, mask=None):
    values = torch.as_tensor(values).expand(output.probs.shape)
    return Intervention(torch.ones_like(values, dtype=torch.bool) if mask is None else mask, values)


@pytest.mark.parametrize("link", ["sigmoid", "logits", "relu", "hard"])
def test_the_head_reads_what_the_link_says(link: str) -> None:
    output = make(link)(Features(torch.randn(64, 5)))
    expected = {
        "sigmoid": output.probs,
        "logits": output.logits,
        "relu": output.logits.relu(),
        "hard": (output.logits >= 0).float(),
    }[link]
    torch.testing.assert_close(output.values, expected)
    assert output.values.requires_grad


@pytest.mark.parametrize(
    ("link", "low", "high"), [("sigmoid", 0, 1), ("hard", 0, 1), ("logits", -5, 5), ("relu", 0, 5)]
)
def test_corrections_before_any_statistics(link: str, low: float, high: float) -> None:
    bottleneck = make(link)
    output = bottleneck(Features(torch.randn(4, 5)))
    fixed = bottleneck.intervene(output, correct(output, [0.0, 1.0, 0.5]))
    torch.testing.assert_close(fixed.values, torch.tensor([low, high, (low + high) / 2]).float().expand(4, 3))
    assert fixed.probs.tolist() == [[0.0, 1.0, 0.5]] * 4


def test_only_masked_entries_change_and_nan_takes_a_concept_out() -> None:
    bottleneck = make("logits", extra_dims=2)
    output = bottleneck(Features(torch.randn(4, 5)))
    mask = torch.tensor([True, False, True]).expand(4, 3)
    fixed = bottleneck.intervene(output, correct(output, [1.0, 0.0, float("nan")], mask))
    torch.testing.assert_close(fixed.values[:, 1], output.values[:, 1])
    torch.testing.assert_close(fixed.values[:, 3:], output.values[:, 3:])
    assert fixed.values[:, 2].tolist() == [0.0] * 4
    torch.testing.assert_close(fixed.probs[:, 2], output.probs[:, 2])
    assert output.values.shape == (4, 5)


def test_a_value_strategy_on_the_logit_scale_goes_through_the_link() -> None:
    bottleneck = make("sigmoid")
    output = bottleneck(Features(torch.randn(2, 5)))
    chosen = torch.full((2, 3), 2.944)
    intervention = Intervention(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), chosen)
    torch.testing.assert_close(bottleneck.intervene(output, intervention).values, chosen.sigmoid())


def test_statistics_are_percentiles_of_the_training_predictions() -> None:
    kinds = ConceptSet(["a", "b", "size"], kinds=["binary", "binary", "real"])
    bottleneck = make("logits", kinds)
    values = torch.randn(501, 3)
    bottleneck.fit_statistics(values, values.sigmoid())
    expected = torch.quantile(values[:, :2], torch.tensor([0.05, 0.95]), dim=0)
    torch.testing.assert_close(bottleneck.value_range[:, :2], expected)
    assert bottleneck.value_range[:, 2].tolist() == [0.0, 1.0]
    output = bottleneck(Features(torch.randn(2, 5)))
    torch.testing.assert_close(
        bottleneck.intervene(output, correct(output, [1.0, 0.0, 7.5])).values[:, 2], torch.tensor([7.5] * 2)
    )
    assert "value_range" in bottleneck.state_dict()


def test_randint_masks_by_sample_and_by_batch() -> None:
    concepts = torch.zeros(4000, 3)
    by_sample = make(randint=0.25).training_mask(concepts, torch.Generator().manual_seed(0))
    assert abs(by_sample.float().mean().item() - 0.25) < 0.02
    by_batch = make(randint=0.5, randint_scope="batch").training_mask(concepts, torch.Generator().manual_seed(1))
    assert (by_batch == by_batch[0]).all()
    assert make().training_mask(concepts, torch.Generator()) is None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"link": "tanh"}, "link"),
        ({"extra_dims": -1}, "extra_dims"),
        ({"randint": 1.5}, "randint"),
        ({"randint_scope": "x"}, "randint_scope"),
    ],
)
def test_bad_options_name_the_field(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        LinearBottleneck(**options)


def test_a_correction_on_the_logit_scale_sets_the_probability_and_can_be_taken_out() -> None:
    bottleneck = LinearBottleneck("logits")
    bottleneck.build(FeatureDims(5), ConceptSet(["a", "b"]), 2)
    output = bottleneck(Features(torch.randn(3, 5)))
    values = torch.tensor([[torch.nan, 1.0]] * 3)
    fixed = bottleneck.intervene(
        output, Intervention(torch.ones(3, 2, dtype=torch.bool), values, torch.full((3, 2), 2.0))
    )
    assert fixed.values.tolist() == [[0.0, 2.0]] * 3
    torch.testing.assert_close(fixed.probs[:, 1], torch.full((3,), 2.0).sigmoid())
    torch.testing.assert_close(fixed.probs[:, 0], output.probs[:, 0])
