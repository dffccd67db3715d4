"""The learned policy of IntCEM against numbers of the official code (Espinosa Zarlenga et al., NeurIPS 2023)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import engine_of, grouped, load, planned, samples_of
from torch import Tensor, nn

from cbm_lightning import CBMModule
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import InterventionAwareBottleneck
from cbm_lightning.interventions import Samples, State
from cbm_lightning.interventions.policies import LearnedPrior
from cbm_lightning.types import Intervention

WIDTH, CLASSES = 6, 3


class Case:
    """A model whose policy network, one linear map, gives the raw scores of the fixture after its corrections."""

    def __init__(self, shared: Path, name: str) -> None:
        self.data = load(shared, f"intcem_prior_{name}")
        self.unit = "group" if name == "groups" else "concept"
        self.corrected = self.data["prev_interventions"].bool()
        torch.manual_seed(0)
        bottleneck = InterventionAwareBottleneck(4, unit=self.unit, hidden=[], batch_norm=False)
        concepts = grouped(self.data["group_ids"])
        self.model = CBMModule(Identity(WIDTH), bottleneck, concepts=concepts, num_classes=CLASSES).eval()
        n = len(self.corrected)
        with torch.no_grad():
            self.prediction = self.model({"embedding": torch.randn(n, WIDTH)})
        truth = (torch.rand(self.corrected.shape) < 0.5).float()
        self.samples: Samples = samples_of(self.prediction, truth, torch.randint(CLASSES, (n,)))
        corrected = bottleneck.intervene(self.prediction.concepts, Intervention(self.corrected, truth))
        self.solve(torch.cat([corrected.values, self.corrected.float()], 1).detach())

    def solve(self, seen: Tensor) -> None:
        """Fewer samples than numbers: some linear map gives each its scores exactly."""
        (linear,) = self.model.bottleneck.policy.layers
        assert isinstance(linear, nn.Linear)
        assert len(seen) < seen.shape[1]
        weight = torch.linalg.lstsq(seen.double(), self.data["raw_scores"].double(), driver="gelsd").solution.T
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.zero_()

    def state(self) -> State:
        """The samples after the corrections of the fixture."""
        return engine_of(self.model, self.unit).start(self.samples).corrected(self.corrected)


@pytest.fixture(params=["groups", "individual"])
def case(shared: Path, request: pytest.FixtureRequest) -> Case:
    return Case(shared, request.param)


def test_raw_scores_become_the_official_prior(case: Case) -> None:
    with torch.inference_mode():
        state = case.state()
        raw = case.model.bottleneck.query_scores(state.output, state.mask)
        prior = LearnedPrior(sample=False).score(state).exp()
    torch.testing.assert_close(raw, case.data["raw_scores"], rtol=1e-3, atol=1e-3)
    left = (~state.asked).any(1)
    assert state.asked.any()
    assert left.sum() > 10
    torch.testing.assert_close(prior[left], case.data["prior"][left], rtol=5e-3, atol=1e-4)


def test_what_was_asked_has_no_probability(case: Case) -> None:
    """In groups as soon as any of the concepts was corrected."""
    with torch.inference_mode():
        state = case.state()
        prior = LearnedPrior(sample=False).score(state).exp()
    left = (~state.asked).any(1)
    assert (prior[left][state.asked[left]] == 0).all()
    assert (case.data["prior"][left][state.asked[left]] == 0).all()


def test_the_engine_draws_from_the_prior(case: Case) -> None:
    """The first question, drawn many times, before any correction."""
    engine, trials = engine_of(case.model, case.unit), 400
    with torch.inference_mode():
        start = engine.start(case.samples)
        expected = case.model.bottleneck.query_scores(start.output, start.mask).softmax(-1)
        first = torch.stack(
            [engine.plan([case.samples], LearnedPrior(), last=1, trial=t)[0] == 1 for t in range(trials)]
        )
        likeliest = planned(engine, case.samples, LearnedPrior(sample=False))
    torch.testing.assert_close(first.float().mean((0, 1)), expected.mean(0), rtol=0, atol=0.03)
    assert torch.equal((likeliest == 1).int().argmax(1), expected.argmax(1))
