from __future__ import annotations

import json
import warnings

import pytest
import torch

from cbm_lightning.concepts import ConceptSet, CoOccurrenceWarning

RICH = ConceptSet(
    ["colour: red", "colour: blue", "round", "size, cm"],
    groups={"colour": ["colour: red", "colour: blue"]},
    kinds=["categorical", "categorical", "binary", "real"],
    texts=["a red bird", "a blue bird", "a round bird", "a big bird"],
)
PLAIN = ConceptSet(["red", 'a "quoted, name"', "blue"])


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_rich_sets_survive_structured_files(tmp_path, suffix) -> None:
    RICH.write(tmp_path / f"c{suffix}")
    assert ConceptSet.read(tmp_path / f"c{suffix}") == RICH


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".concepts"])
def test_names_survive_every_file(tmp_path, suffix) -> None:
    PLAIN.write(tmp_path / f"c{suffix}")
    assert ConceptSet.read(tmp_path / f"c{suffix}") == PLAIN


def test_writing_what_a_format_cannot_hold_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "c.txt"
    PLAIN.write(path)
    with pytest.raises(ValueError, match=r"would hold names only.*kinds"):
        RICH.write(path)
    assert ConceptSet.read(path) == PLAIN
    assert [p.name for p in tmp_path.iterdir()] == ["c.txt"]


def test_make_takes_whatever_a_user_has(tmp_path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(["x", "y"]))
    assert ConceptSet.make(3).names == ("concept_0", "concept_1", "concept_2")
    assert ConceptSet.make(["x", "y"]) == ConceptSet.make(tmp_path / "c.json") == ConceptSet.make({"names": ["x", "y"]})
    assert ConceptSet.make(RICH) is RICH
    assert ConceptSet.make(RICH.to_dict()) == RICH


def test_groups_cover_every_concept_in_order() -> None:
    assert RICH.group_indices() == {"colour": [0, 1], "round": [2], "size, cm": [3]}
    assert RICH.categorical_groups() == [[0, 1]]
    assert RICH.is_real().tolist() == [False, False, False, True]


def test_select_keeps_what_belongs_together() -> None:
    part = RICH.select(["round", "colour: blue"])
    assert part.names == ("round", "colour: blue")
    assert part.kinds == ("binary", "binary")  # a categorical group of one would be constant
    assert part.groups == {"colour": ("colour: blue",)}
    assert part.texts == ("a round bird", "a blue bird")
    assert RICH.select(RICH.names) == RICH


def test_diagnose_says_what_the_data_cannot_tell_apart() -> None:
    concepts = ConceptSet(["a", "b", "not a", "on", "free"])
    a, free = torch.tensor([1.0, 1, 0, 0, 1]), torch.tensor([1.0, 0, 1, 0, 0])
    rows = torch.stack([a, a, 1 - a, torch.ones(5), free], 1)
    rows[4, 1] = float("nan")
    found = " | ".join(concepts.diagnose(rows, torch.tensor([0, 0, 1, 1, 2])))
    assert "'on' never varies" in found
    assert "'a' and 'b' are always equal" in found
    assert "'a' and 'not a' are always opposite" in found
    assert "'free'" not in found
    assert "function of the class" not in found
    by_class = concepts.diagnose(rows[[0, 0, 2, 2]], torch.tensor([0, 0, 1, 1]))
    assert any("function of the class" in sentence for sentence in by_class)


def test_warn_is_short_and_silent_where_there_is_nothing_to_say() -> None:
    rows = torch.rand(50, 3).round()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConceptSet(["a", "b", "c"]).warn(rows, torch.arange(50) % 3)
    with pytest.warns(CoOccurrenceWarning, match=r"are always equal.*\(and 3 more, see"):
        ConceptSet(["a", "b", "c", "d"]).warn(rows[:, [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "at least one concept"),
        ({"names": ["a", "a"]}, "repeated are"),
        ({"names": ["a", " "]}, "empty name"),
        ({"names": ["a"], "kinds": ["binary", "real"]}, "^kinds"),
        ({"names": ["a"], "kinds": "ordinal"}, "^kinds"),
        ({"names": ["a"], "texts": []}, "^texts"),
        ({"names": ["a", "b"], "kinds": "categorical"}, "in no group"),
        ({"names": ["a", "b"], "groups": {"g": ["a", "c"]}}, "no concept is called 'c'"),
        ({"names": ["a", "b"], "groups": {"g": ["a"], "h": ["a"]}}, "is in 'g' and in 'h'"),
        ({"names": ["a", "b"], "groups": {"g": ["a", "b"]}, "kinds": ["categorical", "binary"]}, "mixes kinds"),
        ({"names": ["a"], "embeddings": torch.zeros(2, 3)}, "^embeddings"),
    ],
)
def test_inconsistent_sets_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptSet(**arguments)


def test_unknown_names_come_with_near_matches() -> None:
    with pytest.raises(ValueError, match=r"did you mean \['round'"):
        RICH.index("rond")


@pytest.mark.parametrize(("name", "text"), [("c.json", "{not json"), ("c.yaml", "a: [b"), ("c.txt", "")])
def test_unreadable_files_are_named(tmp_path, name, text) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        ConceptSet.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no concept file"):
        ConceptSet.read(tmp_path / "absent.json")
