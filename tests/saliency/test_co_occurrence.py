"""Which concepts the data never separates: by hand, against loops, and on rendered birds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.rendered_birds import RenderedBirds
from cbm_lightning.saliency import co_occurrence as module
from cbm_lightning.saliency.co_occurrence import cooccurrence

NAN = float("nan")
TIED: dict[str, Any] = {"rule": "linear", "group_correlation": 1.0, "correlated_groups": ["beak", "tail"]}
PARTNERS = [("beak: thick", "tail: fan"), ("beak: long", "tail: long"), ("beak: hooked", "tail: forked")]


def birds(**options: Any) -> RenderedBirds:
    return RenderedBirds(num_train=1500, num_val=200, num_test=800, **options)


def drawn(data: RenderedBirds, split: str) -> tuple[Tensor, ConceptSet, Tensor]:
    concepts, labels = data.annotations(split)
    return concepts, data.concept_set, labels


def annotated(number: int = 400, concepts: int = 7) -> Tensor:
    """Random annotations with gaps; the last two hold rarely and always."""
    found = (torch.rand(number, concepts) < 0.4).float()
    found[:, -2:] = torch.tensor([0.0, 1.0])
    found[torch.rand(number, concepts) < 0.15] = NAN
    return found


def test_counts_agree_with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 64)
    concepts = annotated()
    found = cooccurrence(concepts, [*"abcdefg"])
    rows = concepts.tolist()
    for i in range(7):
        assert found.known[i] == sum(not math.isnan(row[i]) for row in rows)
        assert found.holds[i] == sum(row[i] == 1 for row in rows)
        for j in range(7):
            both = [(row[i], row[j]) for row in rows if not math.isnan(row[i] + row[j])]
            first = [b for a, b in both if a == 1]
            either = [a != b for a, b in both if a + b > 0]
            assert found.together[i, j] == sum(first)
            assert found.either[i, j] == len(either)
            expected = sum(first) / len(first) if first else NAN
            assert found.conditional[i, j].item() == pytest.approx(expected, nan_ok=True)
            expected = sum(either) / len(either) if either else NAN
            assert found.separated[i, j].item() == pytest.approx(expected, nan_ok=True)
    full = {tuple(row) for row in rows if not any(map(math.isnan, row))}
    assert found.distinct_vectors == len(full)
    assert found.always_present == [6]
    assert found.inseparable().tolist() == [False] * 6 + [True]


def test_concepts_that_nearly_always_come_together() -> None:
    concepts = torch.zeros(1000, 4)
    concepts[:200, :2] = 1.0
    concepts[0, 1] = 0.0  # one image in 200 separates the two
    concepts[100:300, 2] = 1.0
    concepts[:, 3] = 1 - concepts[:, 0]
    names = ["beak", "tail", "crest", "plain"]
    near = cooccurrence(concepts, names)
    assert near.groups == [[0, 1]]
    assert near.separated[0, 1].item() == pytest.approx(1 / 200)
    assert near.sentences() == [
        "'beak' and 'tail' come together in 99.5 % of 200 images in which either holds: no map can show that the model "
        "tells them apart"
    ]
    assert cooccurrence(concepts, names, min_separated=0.004).groups == []
    assert cooccurrence(concepts, names, min_separated=1 / 200).groups == [[0, 1]]
    # opposites are told apart wherever one of them is shown, though `diagnose` calls them inseparable by prediction
    assert near.separated[0, 3] == 1
    assert any("opposite" in sentence for sentence in ConceptSet(names).diagnose(concepts))
    assert not near.inseparable()[3]


def test_every_pair_that_is_always_equal_is_found_by_both_checks() -> None:
    concepts = annotated()
    concepts[:, 4] = concepts[:, 1]
    names = ConceptSet(list("abcdefg"))
    assert "concepts 'b' and 'e' are always equal: the data cannot tell them apart" in names.diagnose(concepts)
    assert cooccurrence(concepts, names).groups == [[1, 4]]


def test_chains_make_one_group_and_the_largest_comes_first() -> None:
    # each shares 99 % with the next, the ends of the chain less
    chain = torch.stack([((torch.arange(2000) >= s) & (torch.arange(2000) < s + 800)).float() for s in (8, 0, 4)], 1)
    pair = (torch.rand(2000, 1) < 0.5).float().expand(2000, 2)
    found = cooccurrence(torch.cat([pair, chain, torch.rand(2000, 1)], 1), [*"abcdef"])
    assert found.separated[2, 3] > 0.01
    assert found.separated[2, 4] < 0.01
    assert found.groups == [[2, 3, 4], [0, 1]]
    assert found.sentences()[0].startswith("'c', 'd' and 'e' come together, each with another of them in 99 % or more")
    assert found.sentences()[1].startswith("'a' and 'b' come together in 100 % of")
    assert len(found.sentences(limit=1)) == 1
    assert found.sentences(limit=0) == []


def test_of_many_concepts_the_first_are_named() -> None:
    same = (torch.rand(50, 1) < 0.5).float().expand(50, 30)
    sentence = cooccurrence(same, ConceptSet.make(30)).sentences()[0]
    assert "'concept_7' and 22 more come together, each with another of them in 100 % or more" in sentence
    assert "concept_8" not in sentence


def test_shares_are_rounded_down() -> None:
    concepts = torch.ones(10_001, 2)
    concepts[:1] = 0.0
    concepts[1, 0] = 0.0
    assert "in 99.9 % of 10000 images" in cooccurrence(concepts, [*"ab"]).sentences()[0]


def test_a_concept_that_is_always_there() -> None:
    concepts = torch.tensor([[1.0, 1.0], [1.0, 0.0], [NAN, 0.0]])
    found = cooccurrence(concepts, ["bird", "crest"])
    assert found.groups == []
    assert found.always_present == [0]
    assert found.sentences() == ["'bird' holds in all 2 images: no image without it shows what it is not"]
    assert found.table()["inseparable_from"].tolist() == ["<every image>", ""]


def test_concepts_as_a_function_of_the_class() -> None:
    labels = torch.arange(40) % 4
    table = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    concepts = table[labels]
    assert cooccurrence(concepts, [*"abc"]).function_of_class is None
    found = cooccurrence(concepts, [*"abc"], labels)
    assert found.function_of_class is True
    assert found.distinct_vectors == 3
    assert found.sentences()[0] == (
        "images of a class never differ in a concept (there are 3 different concept vectors): a map may show what "
        "tells the classes apart instead of the concept"
    )
    concepts[7, 1] = 1 - concepts[7, 1]
    assert cooccurrence(concepts, [*"abc"], labels).function_of_class is False


def test_what_is_not_known_is_not_called_inseparable() -> None:
    # never annotated together, never holding, never annotated
    concepts = torch.tensor([[1.0, NAN, 0.0, NAN], [0.0, NAN, 0.0, NAN], [NAN, 1.0, 0.0, NAN], [NAN, 0.0, 0.0, NAN]])
    found = cooccurrence(concepts, [*"abcd"])
    assert found.groups == []
    assert not found.inseparable().any()
    assert found.separated[0, 1].isnan()
    assert found.conditional[2].isnan().all()
    assert found.distinct_vectors == 0
    assert found.closest().tolist() == [2, 2, 0, -1]
    table = found.table()
    assert table["concept"].tolist() == ["a", "b", "c", "d"]
    assert table.iloc[3][["prevalence", "closest", "separated"]].isna().all()


def test_real_concepts_are_not_looked_at() -> None:
    concepts = ConceptSet(["a", "b", "size"], kinds=["binary", "binary", "real"])
    values = torch.tensor([[1.0, 1.0, 30.0], [0.0, 1.0, 4.0], [0.0, 0.0, 0.9]])
    found = cooccurrence(values, concepts)
    assert found.known.tolist() == [3, 3, 0]
    assert found.distinct_vectors == 3
    assert found.closest().tolist() == [1, 0, -1]


def test_table() -> None:
    concepts = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]])
    table = cooccurrence(concepts, ["crest", "beak", "tail"]).table()
    assert table.columns.tolist() == ["concept", "prevalence", "closest", "separated", "inseparable_from"]
    assert table["concept"].tolist() == ["beak", "tail", "crest"]
    assert table["prevalence"].tolist() == pytest.approx([4 / 6, 4 / 6, 3 / 6])
    assert table["closest"].tolist() == ["tail", "beak", "beak"]
    assert table["separated"].tolist() == pytest.approx([0, 0, 5 / 6])
    assert table["inseparable_from"].tolist() == ["tail", "beak", ""]


def test_default_birds_are_separable() -> None:
    data = birds()
    found = cooccurrence(*drawn(data, "train"))
    assert found.groups == []
    assert found.sentences() == []
    assert not found.inseparable().any()
    assert found.function_of_class is False
    assert found.distinct_vectors > 100
    off_diagonal = found.separated[~torch.eye(25, dtype=torch.bool)]
    assert off_diagonal.min() > 0.1


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_birds_whose_beak_and_tail_always_come_together(split: str) -> None:
    data = birds(**TIED)
    names = data.concept_set
    found = cooccurrence(*drawn(data, split))
    assert sorted(found.groups) == sorted([names.index(a), names.index(b)] for a, b in PARTNERS)
    assert {names.names[k] for k in found.inseparable().nonzero().flatten()} == {n for pair in PARTNERS for n in pair}
    assert len(found.sentences()) == 3
    for a, b in PARTNERS:
        i, j = names.index(a), names.index(b)
        assert found.separated[i, j] == 0
        assert found.conditional[i, j] == found.conditional[j, i] == 1
        assert found.holds[i] / found.known[i] == pytest.approx(1 / 3, abs=0.1)
        start = f"{a!r} and {b!r} come together in 100 % of {int(found.holds[i])} images"
        assert any(sentence.startswith(start) for sentence in found.sentences())
    others = found.separated[~found.inseparable()]
    assert others[others > 0].min() > 0.5


def test_the_same_birds_with_beak_and_tail_apart() -> None:
    tied, free = birds(**TIED), birds(rule="linear")
    names = tied.concept_set.names
    assert names == free.concept_set.names
    assert cooccurrence(*drawn(free, "train")).groups == []
    same = (tied.annotations("train")[0] == free.annotations("train")[0]).all(0)
    # all but the attributes that are tied is the same, image by image
    assert {name.split(":")[0] for name, s in zip(names, same.tolist(), strict=True) if not s} <= {"beak", "tail"}
    assert tied.bayes_accuracy() == pytest.approx(free.bayes_accuracy(), abs=0.05)


def test_birds_annotated_by_class() -> None:
    found = cooccurrence(*drawn(birds(concept_labels="class"), "train"))
    assert found.function_of_class is True
    assert found.distinct_vectors == 12


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cooccurrence(ONES, [*"abc"]), r"^concepts: expected \[N, 3\] with N of 1 or more, got \[3, 2\]"),
        (lambda: cooccurrence(ONES[0], [*"ab"]), r"^concepts: expected \[N, 2\]"),
        (lambda: cooccurrence(ONES[:0], [*"ab"]), r"^concepts: expected \[N, 2\]"),
        (lambda: cooccurrence(ONES * 2, [*"ab"]), r"^concepts: expected values in \[0, 1\] or NaN, got 2 for 'a'"),
        (lambda: cooccurrence(ONES, ["a", "a"]), "^names: "),
        (lambda: cooccurrence(ONES, [*"ab"], torch.ones(3, 2)), r"^labels: expected \[3\]"),
        (lambda: cooccurrence(ONES, [*"ab"], torch.ones(2)), r"^labels: expected \[3\]"),
        (lambda: cooccurrence(ONES, [*"ab"], min_separated=1.0), "^min_separated: "),
        (lambda: cooccurrence(ONES, [*"ab"], min_separated=-0.1), "^min_separated: "),
        (lambda: cooccurrence(ONES, [*"ab"]).sentences(-1), "^limit: "),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
