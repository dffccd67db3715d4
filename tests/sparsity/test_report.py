"""The numbers and table of a study; the table of kept concepts, its text and page, for names that are HTML too."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from cbm_lightning.sparsity import NECResult, Sparsity, as_html, as_text, kept_concepts
from cbm_lightning.sparsity.study import NECCurve

CONCEPTS = ["red", "round", "small", "wet"]
CLASSES = ["apple", "stone", "plum"]
WEIGHT = torch.tensor([[0.5, 2.0, 0.0, -3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-6, 1.0]])
HOSTILE = ["<script>alert(1)</script>", 'a"b', "x & y", "it's", "</td></table>", "<!--", "&lt;", "über|ça"]


class Page(HTMLParser):
    """Checks that tags close in order, and keeps the cells and chips of the page."""

    void = frozenset({"meta", "!doctype"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.chips: list[tuple[str, str]] = []
        self.title = self.heading = ""
        self.comments: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in self.void:
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "span":
            self.chips.append((str(dict(attrs)["class"]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "span" in self.open:
            kind, text = self.chips[-1]
            self.chips[-1] = (kind, text + data)
        if "title" in self.open:
            self.title += data
        if "h1" in self.open:
            self.heading += data


def table(weight: torch.Tensor = WEIGHT, concepts: list[str] = CONCEPTS, classes: list[str] = CLASSES) -> pd.DataFrame:
    return kept_concepts(weight, concepts, classes)


# ---------------------------------------------------------------- the table


def test_a_row_a_class_and_concept_the_largest_first() -> None:
    expected = [
        ("apple", "wet", -3.0),
        ("apple", "round", 2.0),
        ("apple", "red", 0.5),
        ("stone", "", 0.0),
        ("plum", "wet", 1.0),
    ]
    found = table()
    assert list(found.columns) == ["class", "concept", "weight"]
    assert list(found.itertuples(index=False, name=None)) == expected


def test_the_threshold_decides_what_is_kept() -> None:
    found = kept_concepts(WEIGHT, CONCEPTS, CLASSES, threshold=1.0)
    assert found["concept"].tolist() == ["wet", "round", "", ""]
    found = kept_concepts(WEIGHT, CONCEPTS, CLASSES, threshold=0.0)
    assert found[found["class"] == "plum"]["concept"].tolist() == ["wet", "small"]


def test_equal_weights_come_in_the_order_of_the_concepts() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert table(weight, classes=["a"])["concept"].tolist() == CONCEPTS


def test_concepts_of_several_numbers_weigh_their_norm() -> None:
    weight = torch.zeros(2, 2, 2)
    weight[0, 0], weight[0, 1] = torch.tensor([3.0, -4.0]), torch.tensor([0.0, 6.0])
    found = kept_concepts(weight, ["red", "wet"], ["a", "b"])
    assert list(found.itertuples(index=False, name=None)) == [("a", "wet", 6.0), ("a", "red", 5.0), ("b", "", 0.0)]


def test_a_head_without_any_concept_has_a_row_a_class() -> None:
    found = table(torch.zeros(3, 4))
    assert found["class"].tolist() == CLASSES
    assert found["concept"].tolist() == [""] * 3


def test_weights_that_train_are_read_without_a_warning() -> None:
    head = torch.nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = table(head.weight)
    assert len(found) == 12


@pytest.mark.parametrize(
    ("concepts", "classes", "message"),
    [
        (CONCEPTS[:3], CLASSES, "expected 4 and 3 names, got 3 and 3"),
        (CONCEPTS, [*CLASSES, "pear"], "expected 4 and 3 names, got 4 and 4"),
    ],
)
def test_names_that_do_not_fit(concepts: list[str], classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(WEIGHT, concepts, classes)


def test_weights_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="weight: expected finite numbers, got NaN or infinity"):
        table(torch.full((3, 4), torch.nan))


# ---------------------------------------------------------------- text and page


def test_the_text_has_a_line_a_class() -> None:
    assert as_text(table()).splitlines() == [
        "apple: -3.00 wet, +2.00 round, +0.50 red",
        "stone: (no concept)",
        "plum: +1.00 wet",
    ]


def test_the_page_has_a_row_a_class_and_colours_for_and_against() -> None:
    page = Page(as_html(table(), "2 concepts a class"))
    assert (page.title, page.heading) == ("2 concepts a class",) * 2
    assert page.rows == [
        ["class", "concepts"],
        ["apple", "wet -3.00round +2.00red +0.50"],
        ["stone", "(no concept)"],
        ["plum", "wet +1.00"],
    ]
    assert page.chips == [("against", "wet -3.00"), ("for", "round +2.00"), ("for", "red +0.50"), ("for", "wet +1.00")]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    found = kept_concepts(torch.tensor([[1.0, -2.0], [0.0, 0.0]]), [name, "b"], [name, "other"])
    source = as_html(found, name)
    page = Page(source)
    assert set(page.tags) == {"html", "meta", "title", "style", "h1", "table", "tr", "th", "td", "span"}
    assert page.comments == []
    assert (page.title, page.heading) == (name, name)
    assert page.rows[1:] == [[name, f"b -2.00{name} +1.00"], ["other", "(no concept)"]]
    assert page.chips == [("against", "b -2.00"), ("for", f"{name} +1.00")]
    assert source.startswith("<!doctype html>")
    assert as_text(found).splitlines() == [f"{name}: -2.00 b, +1.00 {name}", "other: (no concept)"]


def test_classes_stay_in_their_order() -> None:
    classes = ["z", "a", "m"]
    found = table(torch.eye(3, 4), classes=classes)
    assert found["class"].tolist() == classes
    assert [line.split(":")[0] for line in as_text(found).splitlines()] == classes
    assert [row[0] for row in Page(as_html(found, "t")).rows[1:]] == classes


def test_a_page_of_numbers_as_names() -> None:
    # a table read from a file has numbers where names were digits
    found = pd.DataFrame({"class": [0, 1], "concept": ["red", "wet"], "weight": [1.0, -1.0]})
    assert Page(as_html(found, "t")).rows[1:] == [["0", "red +1.00"], ["1", "wet -1.00"]]
    assert as_text(found) == "0: +1.00 red\n1: -1.00 wet"


# ---------------------------------------------------------------- a study


def test_the_numbers_of_a_study_are_named_and_the_area_is_the_mean() -> None:
    curves = {"path": NECCurve([1.0, 2.0], [0.5, 0.8]), "pruned": NECCurve([1.0, 1.25], [0.25, 0.3])}
    found = NECResult([1, 2.5], curves, Sparsity.of(WEIGHT), 40, WEIGHT.unsqueeze(-1))
    assert found.scalars() == pytest.approx(
        {
            "nec": 4 / 3,
            "density": 1 / 3,
            "active_concepts": 3,
            "max_per_class": 3,
            "empty_classes": 1,
            "path/anec": 0.65,
            "path/acc_at_nec1": 0.5,
            "path/acc_at_nec2.5": 0.8,
            "pruned/anec": 0.275,
            "pruned/acc_at_nec1": 0.25,
            "pruned/acc_at_nec2.5": 0.3,
        }
    )
    rows = [("path", 1, 1.0, 0.5), ("path", 2.5, 2.0, 0.8), ("pruned", 1, 1.0, 0.25), ("pruned", 2.5, 1.25, 0.3)]
    assert list(found.table().columns) == ["head", "level", "nec", "accuracy"]
    assert list(found.table().itertuples(index=False, name=None)) == rows
    assert "nec" not in NECResult([1, 2.5], curves, None, 40, WEIGHT.unsqueeze(-1)).scalars()
