"""The confidence region of corrected concepts: beside the official code and a general solver, and as a strategy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_problems import COUNTS, excess, loss_of, official, official_numbers, problem
from golden_models import engine_of
from scipy.optimize import minimize
from scipy.stats import chi2
from small_models import small_model, small_samples
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from cbm_lightning import LinearBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions import InterventionValues, gaussian
from cbm_lightning.interventions.gaussian import (
    ConfidenceRegionValues,
    chi2_quantile,
    condition,
    confidence_region_logits,
)
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return official_numbers(shared)


@pytest.mark.parametrize("count", COUNTS)
def test_the_region_is_kept_and_its_loss_is_at_most_the_official_one(golden: dict[str, Tensor], count: int) -> None:
    mask, theirs = official(golden, "conf_interval_optimal", count)
    concepts = golden["concepts"].double()
    ours = confidence_region_logits(golden["mu"], golden["cov"], mask, concepts)
    assert max(excess(ours, golden["mu"], golden["cov"], mask)) <= 1 + 1e-6
    assert (((2 * concepts - 1) * (ours - golden["mu"]))[mask] >= -1e-4).all()
    assert (loss_of(ours, concepts, mask) <= loss_of(theirs, concepts, mask) + 1e-3).all()
    assert torch.equal(ours[~mask], golden["mu"][~mask])
    if count > 1:
        # the official solver stops early
        assert loss_of(ours, concepts, mask).sum() < loss_of(theirs, concepts, mask).sum() - 1e-3


def solved(mean: np.ndarray, covariance: np.ndarray, concepts: np.ndarray, radius: float) -> float:
    """The smallest loss of one sample, all of whose concepts are corrected, by a general solver in whitened space."""
    factor = np.linalg.cholesky(covariance)
    side = np.where(concepts > 1 / (1 + np.exp(-mean)), 1.0, -1.0)

    def loss(z: np.ndarray) -> float:
        logits = mean + factor @ z
        return float(((1 - concepts) * np.logaddexp(0, logits) + concepts * np.logaddexp(0, -logits)).sum())

    def slope(z: np.ndarray) -> np.ndarray:
        return factor.T @ (1 / (1 + np.exp(-(mean + factor @ z))) - concepts)

    region = {"type": "ineq", "fun": lambda z: radius - z @ z, "jac": lambda z: -2 * z}
    sides = {"type": "ineq", "fun": lambda z: side * (factor @ z), "jac": lambda z: side[:, None] * factor}
    start = np.linalg.solve(factor, side)
    start *= 0.5 * np.sqrt(radius / (start @ start))
    options = {"maxiter": 500, "ftol": 1e-9}
    found = minimize(loss, start, jac=slope, constraints=[region, sides], method="SLSQP", options=options)
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("soft", [False, True])
def test_the_optimum_is_that_of_a_general_solver(soft: bool) -> None:
    mean, covariance, mask, concepts = problem(25, 5, seed=3)
    concepts = 0.1 + 0.8 * torch.rand_like(concepts) if soft else concepts
    ours = confidence_region_logits(mean, covariance, mask, concepts, 0.9)
    assert max(excess(ours, mean, covariance, mask, 0.9)) <= 1 + 1e-9
    found = loss_of(ours, concepts, mask)
    for b in range(25):
        index = mask[b].nonzero().flatten().numpy()
        if len(index):
            part = mean[b].numpy()[index], covariance[b].numpy()[np.ix_(index, index)], concepts[b].numpy()[index]
            assert found[b] == pytest.approx(solved(*part, chi2.ppf(0.9, len(index))), abs=1e-6)


@pytest.mark.parametrize(("k", "spread", "offset"), [(40, 1.0, 1.0), (12, 0.01, 3.0), (12, 30.0, 1.0), (12, 5.0, 30.0)])
def test_the_region_is_kept_at_any_scale(k: int, spread: float, offset: float) -> None:
    mean, covariance, mask, concepts = problem(30, k, 1, spread, offset)
    logits = confidence_region_logits(mean, covariance, mask, concepts)
    ratio = np.array(excess(logits, mean, covariance, mask))
    assert (ratio <= 1 + 1e-9).all()
    side = (2 * concepts - 1) * (logits - mean)
    assert (side[mask] >= 0).all()
    assert (loss_of(logits, concepts, mask) <= loss_of(mean, concepts, mask)).all()
    # the loss falls up to the edge; where it has all but vanished, less than the edge is as good
    flat = loss_of(logits, concepts, mask)[mask.any(1)].numpy() < 1e-6
    assert (ratio[~flat] > 1 - 1e-4).all()


def test_one_concept_goes_to_the_edge_of_its_interval() -> None:
    mean, covariance = torch.tensor([[0.3, 1.0], [0.3, 1.0]]), torch.diag(torch.tensor([4.0, 1.0])).repeat(2, 1, 1)
    mask = torch.tensor([[True, False]] * 2)
    logits = confidence_region_logits(mean, covariance, mask, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.95)
    reach = 2.0 * Normal(0.0, 1.0).icdf(torch.tensor(0.975, dtype=torch.float64)).item()
    expected = torch.tensor([[0.3 + reach, 1.0], [0.3 - reach, 1.0]])
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=1e-5)


def test_each_sample_has_corrections_of_its_own() -> None:
    mean, covariance, mask, concepts = problem(12, 5)
    told = concepts.masked_fill(~mask, torch.nan)
    before = mean.clone(), covariance.clone(), mask.clone()
    together = confidence_region_logits(mean, covariance, mask, told)
    assert together.isfinite().all()
    for b in range(12):
        one = slice(b, b + 1)
        alone = confidence_region_logits(mean[one], covariance[one], mask[one], told[one])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, before, (mean, covariance, mask)))


def test_twins_cannot_be_told_apart() -> None:
    # the first two concepts are one and the same, the third never varies
    direction = torch.tensor([1.0, 1.0, 0.0])
    covariance, everything = (direction[:, None] * direction).unsqueeze(0), torch.ones(1, 3, dtype=torch.bool)
    torn = confidence_region_logits(torch.zeros(1, 3), covariance, everything, torch.tensor([[1.0, 0.0, 1.0]]))
    assert torn.isfinite().all()
    assert 0 <= torn[0, 0] < 0.01
    assert -0.01 < torn[0, 1] <= 0
    agreed = confidence_region_logits(torch.zeros(1, 3), covariance, everything, torch.ones(1, 3))
    assert (agreed[0, :2] > 2).all()


def test_a_wider_region_is_firmer() -> None:
    mean, covariance, mask, concepts = problem(20, 6)
    losses = [
        loss_of(confidence_region_logits(mean, covariance, mask, concepts, p), concepts, mask) for p in (0.5, 0.9, 0.99)
    ]
    some = mask.any(1)
    assert (losses[0][some] > losses[1][some]).all()
    assert (losses[1][some] > losses[2][some]).all()


def test_a_soft_answer_within_the_region_is_reached() -> None:
    mean, covariance, _, _ = problem(8, 4, offset=0.3)
    told = torch.full((8, 4), 0.6, dtype=torch.float64)
    logits = confidence_region_logits(mean, 100 * covariance, torch.ones(8, 4, dtype=torch.bool), told)
    torch.testing.assert_close(logits.sigmoid(), told, rtol=0, atol=1e-3)


def test_concepts_that_pull_apart_stay_on_their_sides() -> None:
    covariance = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]]).double()
    told, both = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    # the first concept is far from right and pulls the second along, which may not leave its side
    logits = confidence_region_logits(torch.tensor([[-6.0, -3.0]]), covariance, both, told)
    assert logits[0, 0] > -6.0
    assert -3.0 - 1e-4 < logits[0, 1] <= -3.0


@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_saturated_predictions(size: float) -> None:
    mean = torch.tensor([[size, -size], [-size, size], [size, size]]).double()
    covariance, told = torch.eye(2).repeat(3, 1, 1), torch.tensor([[1.0, 0.0]]).expand(3, 2)
    logits = confidence_region_logits(mean, covariance, torch.ones(3, 2, dtype=torch.bool), told)
    assert logits.isfinite().all()
    assert (((2 * told - 1) * (logits - mean)) >= 0).all()
    # where both are wrong, both move by the same
    reach = chi2.ppf(0.99, 2) ** 0.5
    torch.testing.assert_close(
        (logits - mean)[1], torch.tensor([1.0, -1.0]).double() * reach / 2**0.5, rtol=0, atol=1e-4
    )


def test_blocks_of_rows_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance, mask, concepts = problem(10, 4)
    whole = confidence_region_logits(mean, covariance, mask, concepts)
    monkeypatch.setattr(gaussian, "ROWS", 3)
    parts = confidence_region_logits(mean, covariance, mask, concepts)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    assert confidence_region_logits(mean[:0], covariance[:0], mask[:0], concepts[:0]).shape == (0, 4)


@pytest.mark.parametrize("level", [1e-3, 0.5, 0.9, 0.99, 1 - 1e-9])
def test_quantiles_of_chi_squared(level: float) -> None:
    degrees = torch.tensor([[1, 2, 3], [10, 112, 500]])
    np.testing.assert_allclose(chi2_quantile(level, degrees), chi2.ppf(level, degrees), rtol=1e-8)


# ---------------------------------------------------------------- the strategy


class GaussianBottleneck(LinearBottleneck):
    """Linear scores with one covariance for all samples; free concepts follow the corrected ones."""

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        output = super().forward(features)
        k = output.logits.shape[1]
        covariance = (0.6 ** (torch.arange(k)[:, None] - torch.arange(k)).abs()).to(output.logits)
        return output.replace(distribution=MultivariateNormal(output.logits, covariance))

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        known = intervention.mask & ~intervention.values.isnan()
        spread = output.distribution.covariance_matrix
        logits = condition(output.distribution.loc, spread, known, intervention.logits)[0].to(output.logits)
        everything = torch.ones_like(intervention.mask)
        return super().intervene(output, Intervention(everything, torch.zeros_like(logits), logits))


def gaussian_output(concepts: ConceptSet, n: int = 4) -> ConceptOutput:
    bottleneck = GaussianBottleneck()
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    with torch.no_grad():
        return bottleneck(Features(torch.randn(n, 5)))


def test_the_strategy_tells_the_region_in_the_precision_of_the_model() -> None:
    output = gaussian_output(ConceptSet.make(3))
    values = InterventionValues.make("confidence_region")
    assert isinstance(values, ConfidenceRegionValues)
    values.build(ConceptSet.make(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, False]])
    told = (torch.rand(4, 3) < 0.5).float().masked_fill(~mask, torch.nan)
    normal = output.distribution
    expected = confidence_region_logits(normal.loc, normal.covariance_matrix, mask, told).float()
    # as Lightning evaluates, under mixed precision
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        correction = values.correction(output, told, mask)
    torch.testing.assert_close(correction.logits, expected)
    assert correction.logits.dtype == output.logits.dtype
    assert correction.mask is mask
    assert correction.values is told
    assert torch.equal(correction.logits[~mask], output.logits[~mask])


def test_what_is_taken_out_leaves_the_region_of_the_others() -> None:
    output, values = gaussian_output(ConceptSet.make(3)), ConfidenceRegionValues()
    values.build(ConceptSet.make(3))
    mask, told = torch.tensor([True, True, False]).expand(4, 3), torch.tensor([1.0, torch.nan, 0.0]).expand(4, 3)
    without = values.correction(output, told, torch.tensor([True, False, False]).expand(4, 3))
    assert torch.equal(values.correction(output, told, mask).logits, without.logits)


def test_real_concepts_are_told_as_they_are() -> None:
    concepts = ConceptSet(["a", "size", "b"], kinds=["binary", "real", "binary"])
    output, values = gaussian_output(concepts), ConfidenceRegionValues(0.9)
    values.build(concepts)
    told, everything = torch.tensor([1.0, 7.5, 0.0]).expand(4, 3), torch.ones(4, 3, dtype=torch.bool)
    logits = values.correction(output, told, everything).logits
    assert (logits[:, 1] == 7.5).all()
    # a large size makes its neighbours likelier, and the region of the others begins there
    normal = output.distribution
    rest = condition(normal.loc, normal.covariance_matrix, concepts.is_real().expand(4, 3), told)
    binary = ~concepts.is_real().expand(4, 3)
    torch.testing.assert_close(logits, confidence_region_logits(*rest, binary, told, 0.9).float())


def test_look_ahead_predicts_anew() -> None:
    model, values = small_model(GaussianBottleneck()), ConfidenceRegionValues()
    values.build(model.concept_set)
    samples, engine = small_samples(model), engine_of(model, values=values)
    mask = torch.zeros(9, 6, dtype=torch.bool)
    mask[:, 1] = True
    with torch.no_grad():
        state = engine.start(samples).corrected(mask, 1)
        # a neighbour moves although nobody corrected it
        assert (state.probs[:, 2] - engine.start(samples).probs[:, 2]).abs().min() > 1e-4
        for k, rows, (found,) in state.branches(state.told):
            further = mask.clone()
            further[:, k] = True
            exact = engine.start(samples).corrected(further).log_probs
            torch.testing.assert_close(found, exact[rows])


def test_what_is_no_distribution_over_concepts_is_refused() -> None:
    output, values = gaussian_output(ConceptSet.make(3)), ConfidenceRegionValues()
    values.build(ConceptSet.make(3))
    told, mask = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)
    for other in (None, Normal(output.logits, 1.0)):
        with pytest.raises(TypeError, match="output.distribution is a MultivariateNormal .* choose 'percentile'"):
            values.correction(output.replace(distribution=other), told, mask)
    wide = MultivariateNormal(torch.zeros(4, 5), torch.eye(5))
    with pytest.raises(ValueError, match=r"over concept logits \[4, 3\], got one over \[4, 5\]"):
        values.correction(output.replace(distribution=wide), told, mask)


@pytest.mark.parametrize("level", [0.0, 1.0, 99.0, float("nan")])
def test_a_level_outside_0_and_1_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level: "):
        ConfidenceRegionValues(level)
    with pytest.raises(ValueError, match="level: "):
        confidence_region_logits(*problem(2, 2), level)
