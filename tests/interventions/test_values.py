"""What a bottleneck is told where a person corrects, and what the head then reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import load
from torch import Tensor

from cbm_lightning import EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.configurable import build as rebuilt
from cbm_lightning.interventions import InterventionValues
from cbm_lightning.interventions.values import (
    BinaryValues,
    ClassConditionalValues,
    CollapseWarning,
    ConstantValues,
    LogitValues,
    OwnValues,
    PercentileValues,
    conditional_percentile,
    percentiles,
)
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention

CONCEPTS = ConceptSet(["a", "b", "c"])
WITH_REAL = ConceptSet(["a", "size", "c"], kinds=["binary", "real", "binary"])
COLOURS = ConceptSet(
    ["red", "green", "blue", "wet"],
    groups={"colour": ["red", "green", "blue"]},
    kinds=["categorical", "categorical", "categorical", "binary"],
)
LINKS = ["sigmoid", "logits", "relu", "hard"]
LOGIT_STRATEGIES = [PercentileValues(), ClassConditionalValues(), ConstantValues()]
# absent and present of each concept, on the logit scale
RANGE = torch.tensor([[-2.0, -1.0, 0.5], [1.0, 3.0, 2.0]])


def output_of(bottleneck: Bottleneck, concepts: ConceptSet = CONCEPTS, n: int = 3) -> ConceptOutput:
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    with torch.no_grad():
        return bottleneck(Features(torch.randn(n, 5)))


def linear(link: str, concepts: ConceptSet = CONCEPTS) -> tuple[LinearBottleneck, ConceptOutput]:
    bottleneck = LinearBottleneck(link)
    return bottleneck, output_of(bottleneck, concepts)


def strategy_with(bounds: Tensor, concepts: ConceptSet = CONCEPTS) -> LogitValues:
    values = PercentileValues()
    values.build(concepts)
    values.set_range(*bounds)
    return values


def corrected(
    values: InterventionValues,
    bottleneck: Bottleneck,
    output: ConceptOutput,
    told: list[float] | Tensor,
    mask: Tensor | None = None,
) -> ConceptOutput:
    told = torch.as_tensor(told).expand(output.logits.shape)
    mask = torch.ones_like(told, dtype=torch.bool) if mask is None else mask
    return bottleneck.intervene(output, values.correction(output, told, mask))


# ---------------------------------------------------------------- the official numbers


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load(shared, "quantile_values")


def test_percentiles_of_all_samples_are_the_official_ones(golden: dict[str, Tensor]) -> None:
    found = percentiles(golden["concept_probs"], (0.05, 0.95))
    torch.testing.assert_close(found, golden["scbm_q05_q95"], rtol=0, atol=0)
    torch.testing.assert_close(found, torch.stack([golden["koh_ptl5"], golden["koh_ptl95"]]), rtol=0, atol=1e-7)


def test_class_conditional_percentiles_are_the_official_ones(golden: dict[str, Tensor]) -> None:
    probs, concepts = golden["concept_probs"], golden["concepts"]
    known, nothing = torch.ones_like(concepts, dtype=torch.bool), torch.full((4,), torch.nan)
    low = conditional_percentile(probs, concepts == 0, known, 0.05, nothing)
    high = conditional_percentile(probs, concepts == 1, known, 0.95, nothing)
    assert torch.equal(low, golden["havasi_c5_negatives"])
    assert torch.equal(high, golden["havasi_c95_positives"])
    values = ClassConditionalValues()
    values.build(ConceptSet.make(4))
    values.fit(probs.logit(), concepts.float())
    # an element of the sorted list is the same one on every monotone scale
    torch.testing.assert_close(values.logit_range.sigmoid(), torch.stack([low, high]), rtol=0, atol=1e-6)


def test_percentiles_on_the_logit_scale(golden: dict[str, Tensor]) -> None:
    logits = golden["concept_probs"].logit()
    values = PercentileValues((0.1, 0.8))
    values.build(ConceptSet.make(4))
    values.fit(logits, golden["concepts"].float())
    expected = np.percentile(logits.numpy(), [10, 80], axis=0)
    torch.testing.assert_close(values.logit_range, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- names


def test_every_strategy_has_a_short_name() -> None:
    names = {"own", "binary", "percentile", "class_conditional_percentile", "constant"}
    assert names <= InterventionValues.registry.keys()
    for name in names:
        made = InterventionValues.make(name)
        assert type(made) is InterventionValues.registry[name]
        assert made.name == name
        assert type(rebuilt(made.spec())) is type(made)
        assert made.needs_train == ("percentile" in name)
    mine = ConstantValues(0.1, 0.9)
    assert InterventionValues.make(mine) is mine
    assert rebuilt(mine.spec()).bounds.tolist() == mine.bounds.tolist()


def test_an_unknown_name_is_refused_with_near_matches() -> None:
    with pytest.raises(ValueError, match="values: nothing is called 'percentil'; did you mean 'percentile'"):
        InterventionValues.make("percentil")
    with pytest.raises(ValueError, match=r"values: nothing is called 'zzz'; there are \[.*'binary'.*'own'"):
        InterventionValues.make("zzz")


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterventionValues, "registry", dict(InterventionValues.registry))

    class Timid(InterventionValues):
        name = "timid"

        def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
            return Intervention(mask, 0.25 + 0.5 * told)

    bottleneck, output = linear("sigmoid")
    found = corrected(InterventionValues.make("timid"), bottleneck, output, [0.0, 1.0, 0.5])
    assert found.values.tolist() == [[0.25, 0.75, 0.5]] * 3
    assert InterventionValues.make("timid").state_dict() == {}


# ---------------------------------------------------------------- the bottleneck's own scale


@pytest.mark.parametrize("link", LINKS)
def test_own_values_lie_on_the_scale_of_the_link(link: str) -> None:
    bottleneck, output = linear(link)
    values = OwnValues()
    values.build(CONCEPTS)
    low, high = {"sigmoid": (0.0, 1.0), "hard": (0.0, 1.0), "logits": (-5.0, 5.0), "relu": (0.0, 5.0)}[link]
    found = corrected(values, bottleneck, output, [0.0, 1.0, 0.25])
    assert found.values.tolist() == [[low, high, low + 0.25 * (high - low)]] * 3
    assert found.probs.tolist() == [[0.0, 1.0, 0.25]] * 3
    if link in ("logits", "relu"):
        bottleneck.value_range.copy_(RANGE)
        found = corrected(values, bottleneck, output, [0.0, 1.0, 0.5])
        assert found.values.tolist() == [[-2.0, 3.0, 1.25]] * 3


@pytest.mark.parametrize("link", LINKS)
def test_binary_values_round(link: str) -> None:
    bottleneck, output = linear(link)
    binary, own = BinaryValues(), OwnValues()
    binary.build(CONCEPTS)
    rounded = corrected(own, bottleneck, output, [0.0, 1.0, 1.0])
    assert torch.equal(corrected(binary, bottleneck, output, [0.49, 0.5, 0.9]).values, rounded.values)


def test_own_and_binary_values_mix_the_embeddings() -> None:
    bottleneck = EmbeddingBottleneck(2)
    output = output_of(bottleneck)
    present, absent = output.extras["pairs"].unbind(2)
    for values, third in ((OwnValues(), 0.25 * present[:, 2] + 0.75 * absent[:, 2]), (BinaryValues(), absent[:, 2])):
        values.build(CONCEPTS)
        found = corrected(values, bottleneck, output, [0.0, 1.0, 0.25]).values.unflatten(1, (3, 2))
        torch.testing.assert_close(found, torch.stack([absent[:, 0], present[:, 1], third], 1))


# ---------------------------------------------------------------- the logit scale


@pytest.mark.parametrize("link", LINKS)
def test_logits_go_through_the_link(link: str) -> None:
    bottleneck, output = linear(link)
    found = corrected(strategy_with(RANGE), bottleneck, output, [0.0, 1.0, 0.5])
    logits = torch.tensor([-2.0, 3.0, 1.25]).expand(3, 3)
    expected = {
        "sigmoid": logits.sigmoid(),
        "logits": logits,
        "relu": logits.relu(),
        "hard": torch.tensor([0.0, 1.0, 1.0]).expand(3, 3),
    }[link]
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.probs, logits.sigmoid())


def test_logits_mix_the_embeddings() -> None:
    bottleneck = EmbeddingBottleneck(2)
    output = output_of(bottleneck)
    found = corrected(strategy_with(RANGE), bottleneck, output, [0.0, 1.0, 0.5])
    share = torch.tensor([-2.0, 3.0, 1.25]).sigmoid()[:, None]
    present, absent = output.extras["pairs"].unbind(2)
    torch.testing.assert_close(found.values.unflatten(1, (3, 2)), share * present + (1 - share) * absent)


@pytest.mark.parametrize("values", [*LOGIT_STRATEGIES, OwnValues(), BinaryValues()], ids=lambda values: values.name)
@pytest.mark.parametrize("link", LINKS)
def test_where_nobody_corrects_nothing_changes(link: str, values: InterventionValues) -> None:
    bottleneck, output = linear(link)
    values.build(CONCEPTS)
    values.fit(torch.randn(40, 3), (torch.rand(40, 3) < 0.5).float())
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    told = torch.tensor([1.0, 0.0, 1.0]).expand(3, 3).masked_fill(~mask, torch.nan)
    found = corrected(values, bottleneck, output, told, mask)
    assert found.values.isfinite().all()
    assert torch.equal(found.values[~mask], output.values[~mask])
    assert torch.equal(found.probs[~mask], output.probs[~mask])
    everywhere = corrected(values, bottleneck, output, [1.0, 0.0, 1.0])
    assert torch.equal(found.values[mask], everywhere.values[mask])


@pytest.mark.parametrize(("low", "high", "scale"), [(0.05, 0.95, "probability"), (-5.0, 5.0, "logit")])
def test_constant_values(low: float, high: float, scale: str) -> None:
    bottleneck, output = linear("sigmoid")
    values = ConstantValues(low, high, scale)
    values.build(CONCEPTS)
    ends = torch.tensor([low, high]) if scale == "probability" else torch.tensor([low, high]).sigmoid()
    found = corrected(values, bottleneck, output, [0.0, 1.0, 0.5])
    torch.testing.assert_close(found.values, torch.tensor([ends[0], ends[1], 0.5]).expand(3, 3))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("values", [*LOGIT_STRATEGIES, OwnValues(), BinaryValues()], ids=lambda values: values.name)
def test_real_concepts_are_told_as_they_are(values: InterventionValues, link: str) -> None:
    bottleneck, output = linear(link, WITH_REAL)
    values.build(WITH_REAL)
    values.fit(torch.randn(40, 3), torch.rand(40, 3).round())
    found = corrected(values, bottleneck, output, [1.0, -7.5, 0.0])
    assert found.values[:, 1].tolist() == [-7.5] * 3
    assert found.probs[:, 1].tolist() == [-7.5] * 3


# ---------------------------------------------------------------- categorical groups


def test_a_told_group_is_a_softmax_of_what_its_members_are_told() -> None:
    bottleneck, output = linear("sigmoid", COLOURS)
    bounds = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [2.0, 2.0, 2.0, 2.0]])
    values = strategy_with(bounds, COLOURS)
    assert values.couples_groups
    assert not strategy_with(RANGE).couples_groups
    found = corrected(values, bottleneck, output, [0.0, 1.0, 0.0, 1.0])
    expected = torch.tensor([-1.0, 2.0, -3.0]).softmax(0).expand(3, 3)
    torch.testing.assert_close(found.values[:, :3], expected)
    torch.testing.assert_close(found.values[:, 3], torch.tensor(2.0).sigmoid().expand(3))


def test_part_of_a_group_is_told_beside_the_predicted_rest() -> None:
    bottleneck, output = linear("sigmoid", COLOURS)
    values = strategy_with(torch.tensor([-1.0, 2.0])[:, None].repeat(1, 4), COLOURS)
    mask = torch.tensor([True, False, False, False]).expand(3, 4)
    found = corrected(values, bottleneck, output, [1.0, 0.0, 0.0, 0.0], mask)
    rest = output.logits[:, 1:3]
    first = torch.cat([torch.full((3, 1), 2.0), rest], 1).softmax(1)[:, 0]
    torch.testing.assert_close(found.values[:, 0], first)
    assert torch.equal(found.values[:, 1:], output.values[:, 1:])


@pytest.mark.parametrize("values", [OwnValues(), BinaryValues()], ids=lambda values: values.name)
def test_own_values_couple_no_groups(values: InterventionValues) -> None:
    bottleneck, output = linear("sigmoid", COLOURS)
    values.build(COLOURS)
    assert not values.couples_groups
    assert corrected(values, bottleneck, output, [0.0, 1.0, 0.0, 1.0]).values.tolist() == [[0.0, 1.0, 0.0, 1.0]] * 3


# ---------------------------------------------------------------- learning from training data


def test_class_conditional_percentiles_by_hand() -> None:
    logits = torch.arange(10.0).flip(0)[:, None].repeat(1, 3)
    concepts = (logits >= 6).float()
    concepts[:, 1] = 1.0
    concepts[5:, 2] = torch.nan
    values = ClassConditionalValues((0.5, 0.8))
    values.build(CONCEPTS)
    values.fit(logits, concepts)
    # absent are 0..5 and present 6..9: elements 3 and 3; then the percentile over all, and all of 0..9; then 5 and 6..9
    torch.testing.assert_close(values.logit_range, torch.tensor([[3.0, 4.5, 5.0], [9.0, 8.0, 9.0]]))


def test_concepts_with_one_outcome_fall_back_to_all_samples() -> None:
    logits = torch.randn(30, 3)
    concepts = torch.tensor([0.0, 1.0, torch.nan]).expand(30, 3)
    conditional, plain = ClassConditionalValues((0.2, 0.7)), PercentileValues((0.2, 0.7))
    for values in (conditional, plain):
        values.build(CONCEPTS)
        values.fit(logits, concepts)
    # the first is always absent, the second always present, the third not annotated at all
    assert conditional.logit_range[1, 0] == plain.logit_range[1, 0]
    assert conditional.logit_range[0, 0] == logits[:, 0].sort().values[6]
    assert conditional.logit_range[0, 1] == plain.logit_range[0, 1]
    assert conditional.logit_range[1, 1] == logits[:, 1].sort().values[21]
    assert torch.equal(conditional.logit_range[:, 2], plain.logit_range[:, 2])


def test_the_ends_of_the_range_of_quantiles() -> None:
    logits, concepts = torch.randn(30, 3), (torch.rand(30, 3) < 0.5).float()
    for values in (PercentileValues((0.0, 1.0)), ClassConditionalValues((0.0, 1.0))):
        values.build(CONCEPTS)
        values.fit(logits, concepts)
        lowest, highest = logits.amin(0), logits.amax(0)
        if isinstance(values, ClassConditionalValues):
            lowest = logits.masked_fill(concepts == 1, torch.inf).amin(0)
            highest = logits.masked_fill(concepts == 0, -torch.inf).amax(0)
        torch.testing.assert_close(values.logit_range, torch.stack([lowest, highest]))


@pytest.mark.parametrize("values", [PercentileValues(), ClassConditionalValues()], ids=lambda values: values.name)
def test_a_dead_concept_is_named(values: InterventionValues) -> None:
    logits, concepts = torch.randn(40, 8), (torch.rand(40, 8) < 0.5).float()
    concepts[0], concepts[1] = 0.0, 1.0
    logits -= 20 * (1 - concepts)
    logits[:, 3] = -1.5
    values.build(ConceptSet.make(8))
    with pytest.warns(
        CollapseWarning, match=f"the {values.name} values .* 1 concepts, 'concept_3': .*choose values='constant'"
    ):
        values.fit(logits, concepts)
    logits[:, 1:] = 0.5
    with pytest.warns(CollapseWarning, match=r"7 concepts, 'concept_1', .*'concept_5' and 2 more: "):
        values.fit(logits, concepts)


def test_a_real_concept_is_never_dead() -> None:
    values = PercentileValues()
    values.build(WITH_REAL)
    logits = torch.randn(40, 3)
    logits[:, 1] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values.fit(logits, torch.zeros(40, 3))
    assert values.logit_range[:, 1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("values", [PercentileValues(), ClassConditionalValues()], ids=lambda values: values.name)
def test_what_was_learned_is_saved_and_restored(values: InterventionValues, tmp_path: Path) -> None:
    values = rebuilt(values.spec())
    values.build(CONCEPTS)
    _, output = linear("sigmoid")
    told, mask = torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bool)
    assert values.state_dict() == {}
    with pytest.raises(RuntimeError, match=f"the {values.name} values were never fitted"):
        values.correction(output, told, mask)
    values.fit(torch.randn(40, 3), torch.eye(3).repeat(14, 1)[:40])
    torch.save(values.state_dict(), tmp_path / "values.pt")
    fresh = rebuilt(values.spec())
    fresh.build(CONCEPTS)
    fresh.load_state_dict(torch.load(tmp_path / "values.pt", weights_only=True))
    assert torch.equal(fresh.correction(output, told, mask).logits, values.correction(output, told, mask).logits)


@pytest.mark.parametrize("cls", [PercentileValues, ClassConditionalValues])
@pytest.mark.parametrize("quantiles", [(0.9, 0.1), (0.5, 0.5), (-0.1, 0.9), (0.05, 95.0), (0.5,), (0.1, 0.5, 0.9)])
def test_quantiles_that_make_no_sense_are_refused(cls: type[LogitValues], quantiles: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="quantiles: expected two increasing numbers"):
        cls(quantiles)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"low": 0.9, "high": 0.1}, "low, high"),
        ({"low": 0.0}, "low, high"),
        ({"high": 1.0}, "low, high"),
        ({"low": 0.5, "high": 0.5}, "low, high"),
        ({"low": float("nan")}, "low, high"),
        ({"low": 5.0, "high": -5.0, "scale": "logit"}, "low, high"),
        ({"scale": "percent"}, "scale"),
    ],
)
def test_constants_that_make_no_sense_are_refused(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        ConstantValues(**options)
