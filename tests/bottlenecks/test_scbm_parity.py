"""Corrections of a stochastic bottleneck against the numbers of the official code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussian_problems import COUNTS, official, official_numbers
from torch import Tensor
from torch.distributions import MultivariateNormal

from cbm_lightning.bottlenecks import StochasticBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions.gaussian import ConfidenceRegionValues
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention

STRATEGIES = ["simple_perc", "emp_perc", "conf_interval_optimal"]
DRAWS = 4000


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return official_numbers(shared)


@pytest.fixture(scope="module")
def predicted(golden: dict[str, Tensor]) -> tuple[StochasticBottleneck, ConceptOutput]:
    """A bottleneck that predicts the stored moments."""
    bottleneck = StochasticBottleneck("empirical", samples=DRAWS)
    bottleneck.build(FeatureDims(6), ConceptSet.make(6), num_classes=4)
    with torch.no_grad():
        bottleneck.mean.weight.copy_(torch.eye(6))
        bottleneck.mean.bias.zero_()
    mean, scale = golden["mu"].float(), torch.linalg.cholesky(golden["cov"]).float()
    # each of the stored samples has a covariance of its own
    bottleneck.scale = lambda pooled: scale  # type: ignore[method-assign]
    with torch.no_grad():
        return bottleneck.eval(), bottleneck(Features(mean))


def test_predicted_probabilities(
    golden: dict[str, Tensor], predicted: tuple[StochasticBottleneck, ConceptOutput]
) -> None:
    output = predicted[1]
    assert isinstance(output.distribution, MultivariateNormal)
    torch.testing.assert_close(output.distribution.covariance_matrix, golden["cov"].float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.values.mean(0), output.probs, rtol=0, atol=0.03)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_corrected_probabilities(
    golden: dict[str, Tensor], predicted: tuple[StochasticBottleneck, ConceptOutput], strategy: str, count: int
) -> None:
    bottleneck, output = predicted
    mask, logits = official(golden, strategy, count)
    told = golden["concepts"].float()
    found = bottleneck.intervene(output, Intervention(mask, told, logits.float()))
    expected = golden[f"mc_mean_probs__{strategy}__{count}"]
    torch.testing.assert_close(found.probs, expected, rtol=0, atol=0.03)
    free = ~mask
    variance = golden[f"cond_cov__{strategy}__{count}"].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.uncertainty[free].view(12, -1).double().square(), variance, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.values[:, mask], told[mask].expand(DRAWS, -1))
    torch.testing.assert_close(found.values.mean(0)[free], expected[free], rtol=0, atol=0.04)


def test_its_own_values_are_the_simple_percentiles_until_it_has_trained(
    golden: dict[str, Tensor], predicted: tuple[StochasticBottleneck, ConceptOutput]
) -> None:
    bottleneck, output = predicted
    mask, logits = official(golden, "simple_perc", 3)
    told = golden["concepts"].float()
    by_itself = bottleneck.intervene(output, Intervention(mask, told))
    officially = bottleneck.intervene(output, Intervention(mask, told, logits.float()))
    torch.testing.assert_close(by_itself.probs, officially.probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_confidence_regions_through_the_bottleneck(
    golden: dict[str, Tensor], predicted: tuple[StochasticBottleneck, ConceptOutput], count: int
) -> None:
    bottleneck, output = predicted
    mask, _ = official(golden, "conf_interval_optimal", count)
    values = ConfidenceRegionValues()
    values.build(bottleneck.concepts)
    told = golden["concepts"].float()
    found = bottleneck.intervene(output, values.correction(output, told, mask))
    # the official solver stops early, so its corrections are a little weaker
    expected = golden[f"mc_mean_probs__conf_interval_optimal__{count}"]
    torch.testing.assert_close(found.probs, expected, rtol=0, atol=0.05)
