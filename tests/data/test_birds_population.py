"""The law of labels and attribute values: exact sums against draws, and what each option does to the draws."""

from __future__ import annotations

import pytest
import torch

from cbm_lightning.data.birds.annotate import seen_values
from cbm_lightning.data.birds.attributes import ATTRIBUTES
from cbm_lightning.data.birds.population import Population
from cbm_lightning.data.birds.rules import LabelRule, flat_index, matches
from cbm_lightning.randomness import Randomness

EVERY = [name for group in ATTRIBUTES for name in group.concepts]
CORRELATED = ["body colour", "beak", "crest"]


def draws(number: int = 20_000, seed: int = 0) -> Randomness:
    return Randomness(seed, "train", torch.arange(number))


def population(
    rule: str = "codebook", variation: float = 0.1, correlation: float = 0.0, **options: object
) -> Population:
    return Population(LabelRule(rule, ATTRIBUTES, **options), variation, correlation, CORRELATED)


def test_uniforms_depend_on_seed_split_stream_and_index_only() -> None:
    few, many = draws(3).uniform("a", 4), draws(500).uniform("a", 4)
    assert torch.equal(few, many[:3])
    for other in (
        draws(500, 1).uniform("a", 4),
        draws(500).uniform("b", 4),
        Randomness(0, "val", torch.arange(500)).uniform("a", 4),
    ):
        assert (other == many).float().mean() < 0.01


def test_uniforms_are_uniform_and_columns_independent() -> None:
    uniform = draws(50_000).uniform("a", 3)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, 20, 0, 1) / uniform.numel()
    torch.testing.assert_close(counts, torch.full((20,), 0.05), atol=0.003, rtol=0)
    assert torch.corrcoef(uniform.T).fill_diagonal_(0).abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([uniform[1:, 0], uniform[:-1, 0]]))
    assert abs(neighbours[0, 1]) < 0.02
    normal = draws(50_000).normal("n", 1)
    assert normal.isfinite().all()
    torch.testing.assert_close(normal.std(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_prototypes_are_different_and_balanced() -> None:
    book = LabelRule("codebook", ATTRIBUTES).prototypes()
    assert len(torch.unique(book, dim=0)) == 12
    for column, group in zip(book.T, ATTRIBUTES, strict=True):
        assert torch.bincount(column).tolist() == [12 // len(group.values)] * len(group.values)
    assert not torch.equal(book, LabelRule("codebook", ATTRIBUTES, seed=1).prototypes())


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["codebook", "table", "linear", "xor", "count"])
def test_exact_ceiling_is_reached_by_the_likeliest_class(rule: str, correlation: float) -> None:
    law = population(rule, 0.2, correlation)
    names = [name for name in EVERY if "wing" not in name or name.endswith(("red", "present"))]
    joint = law.label_and(seen_values(ATTRIBUTES, names)).flatten(1)
    assert joint.sum() == pytest.approx(1)
    ceiling = float(joint.max(0).values.sum())

    birds = law.sample(draws())
    patterns = seen_values(ATTRIBUTES, names)
    answers = torch.stack([p[v].argmax(1) for p, v in zip(patterns, birds.values.T, strict=True)], dim=1)
    guess = joint.argmax(0)[flat_index(answers, [p.shape[1] for p in patterns])]
    assert (guess == birds.labels).double().mean() == pytest.approx(ceiling, abs=0.012)


def test_joint_law_of_two_concepts_is_the_sum_over_everything_else() -> None:
    law = population("table", 0.3, 0.5, seed=3)
    whole = law.label_and([torch.eye(len(group.values)).double() for group in ATTRIBUTES])
    two = law.label_and(seen_values(ATTRIBUTES, ["body colour: blue", "beak: hooked"])).flatten(1)
    by_hand = whole.sum((2, 3, 5, 6, 7, 8, 9, 10))  # [L, body, beak]
    blue, hooked = by_hand[:, 2], by_hand[:, :, 2].sum(1)
    assert two.shape == (12, 4)
    both = by_hand[:, 2, 2]
    expected = torch.stack(
        [by_hand.sum((1, 2)) - blue.sum(1) - hooked + both, hooked - both, blue.sum(1) - both, both], dim=1
    )
    torch.testing.assert_close(two, expected)


def test_xor_needs_both_groups() -> None:
    law = population("xor", 0.0)

    def ceiling(*names: str) -> float:
        return float(law.label_and(seen_values(ATTRIBUTES, names)).flatten(1).max(0).values.sum())

    assert ceiling("crest: present") == pytest.approx(0.5)
    assert ceiling("wing bar: present") == pytest.approx(0.5)
    assert ceiling("crest: present", "wing bar: present") == pytest.approx(1.0)


def test_rules_follow_from_values() -> None:
    for rule, expected in (
        ("xor", lambda v: v[:, 7] ^ v[:, 8]),
        ("count", lambda v: v[:, 6:].sum(1)),
    ):
        birds = population(rule, 0.0).sample(draws(500))
        assert torch.equal(birds.labels, expected(birds.values))
    few = population("count", 0.0, num_classes=3).sample(draws(500))
    assert torch.equal(few.labels, few.values[:, 6:].sum(1).clamp(max=2))


@pytest.mark.parametrize("rule", ["table", "linear"])
def test_classes_are_about_equally_frequent(rule: str) -> None:
    frequency = torch.bincount(population(rule).sample(draws()).labels, minlength=12) / 20_000
    torch.testing.assert_close(frequency, torch.full((12,), 1 / 12), atol=0.02, rtol=0)


def test_variation_draws_values_anew_whatever_the_label() -> None:
    book = LabelRule("codebook", ATTRIBUTES).prototypes()
    still = population(variation=0.0).sample(draws(300))
    assert torch.equal(still.values, book[still.labels])
    varied = population(variation=0.2).sample(draws())
    for column, group in enumerate(ATTRIBUTES):
        changed = (varied.values[:, column] != varied.own[:, column]).double().mean()
        assert changed == pytest.approx(0.2 * (1 - 1 / len(group.values)), abs=0.01)
    free = population(variation=1.0).label_and([torch.eye(len(group.values)).double() for group in ATTRIBUTES])
    assert free.flatten(1).max(0).values.sum() == pytest.approx(1 / 12)


def test_correlated_groups_keep_their_marginals_and_gain_a_correlation() -> None:
    plain, law = population("linear", 0.1), population("linear", 0.1, 0.9)
    values = law.sample(draws()).values
    for column, group in enumerate(ATTRIBUTES):
        share = torch.bincount(values[:, column]) / len(values)
        torch.testing.assert_close(share, torch.full_like(share, 1 / len(group.values)), atol=0.015, rtol=0)
    assert torch.corrcoef(values[:, [0, 3, 7]].T.float()).min() > 0.6
    assert torch.corrcoef(values[:, [0, 1]].T.float()).min().abs() < 0.03
    assert torch.corrcoef(plain.sample(draws()).values[:, [0, 3]].T.float()).min().abs() < 0.03


def test_groups_correlated_to_one_always_go_together() -> None:
    law = Population(LabelRule("linear", ATTRIBUTES), 0.3, 1.0, ["crest", "wing bar"])
    values = law.sample(draws(2000)).values
    assert torch.equal(values[:, 7], values[:, 8])
    both = law.label_and(seen_values(ATTRIBUTES, ["crest: present", "wing bar: present"])).sum(0).squeeze()
    torch.testing.assert_close(both, torch.eye(2).double() / 2)


def test_typical_values_are_the_prototypes() -> None:
    law = population(variation=0.5)
    assert torch.equal(law.typical, law.rule.prototypes())


def test_excluded_combinations_never_occur_and_forced_ones_do() -> None:
    held = [{0: 0, 3: 1}, {7: 1, 8: 1}]
    for rule in ("codebook", "linear"):
        law = Population(LabelRule(rule, ATTRIBUTES, forbidden=held), 0.4)
        free = law.sample(draws(4000))
        assert matches(free.values, held).float().mean() > 0.02
        without = law.sample(draws(4000), excluded=held)
        assert not matches(without.values, held).any()
        unaffected = ~matches(free.values, held)
        assert torch.equal(without.values[unaffected], free.values[unaffected])
        assert matches(law.sample(draws(4000), forced=held, forced_share=1.0).values, held).all()
        half = matches(law.sample(draws(4000), forced=held, forced_share=0.5).values, held).double().mean()
        assert half > 0.5


def test_excluding_everything_is_an_error() -> None:
    law = Population(LabelRule("linear", ATTRIBUTES), 0.1)
    with pytest.raises(ValueError, match="held_out"):
        law.sample(draws(50), excluded=[{6: 0}, {6: 1}])


def test_swap_changes_one_value_of_the_chosen_birds_and_nothing_else() -> None:
    law = population(variation=0.0)
    before, after = law.sample(draws(3000)), law.sample(draws(3000), swap=0.5)
    chosen = after.swapped >= 0
    assert chosen.double().mean() == pytest.approx(0.5, abs=0.03)
    different = before.values != after.values
    assert torch.equal(different.sum(1), chosen.long())
    assert torch.equal(different[chosen].int().argmax(1), after.swapped[chosen])
    assert torch.equal(before.labels, after.labels)
    assert len(after.swapped[chosen].unique()) == len(ATTRIBUTES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tree"}, "rule: expected one of"),
        ({"name": "table", "rule_groups": ["beek"]}, r"did you mean \['beak'\]"),
        ({"name": "codebook", "rule_groups": ["beak"]}, "rule_groups"),
        ({"name": "xor", "rule_groups": ["beak"]}, "xor reads two"),
        ({"name": "xor", "num_classes": 9}, "2 to 3 classes, got 9"),
        ({"name": "count", "num_classes": 1}, "got 1"),
        ({"name": "table", "num_classes": 25}, "2 to 24"),
    ],
)
def test_bad_rules(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelRule(**{"groups": ATTRIBUTES, **options})


def test_prototypes_avoid_forbidden_combinations_and_repeats() -> None:
    held = [{0: 0, 3: 1}, {7: 1, 8: 1}]
    assert not matches(LabelRule("codebook", ATTRIBUTES, 40, forbidden=held).prototypes(), held).any()
    many = LabelRule("codebook", ATTRIBUTES, 1000).prototypes()
    assert len(torch.unique(many, dim=0)) == 1000


def test_codebook_that_cannot_avoid_a_held_out_value() -> None:
    with pytest.raises(ValueError, match="held_out"):
        LabelRule("codebook", ATTRIBUTES, forbidden=[{6: 0}, {6: 1}]).prototypes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variation": 1.5}, "within_class_variation"),
        ({"correlation": -0.1}, "group_correlation"),
        ({"correlated_groups": ["beak"]}, "at least two"),
        ({"correlated_groups": ["beak", "bill"]}, "no group is called 'bill'"),
    ],
)
def test_bad_populations(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Population(LabelRule("linear", ATTRIBUTES), **options)
