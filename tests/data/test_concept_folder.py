"""ConceptFolder: a user's tables in every layout, what is wrong with them, and real traffic signs split by sign."""

from __future__ import annotations

import json
from pathlib import Path

import jsonargparse
import numpy as np
import pandas as pd
import pytest
import torch
from gtsrb_folder import write_gtsrb_folder
from PIL import Image

from cbm_lightning.data.concept_folder import ConceptFolder
from cbm_lightning.data.concept_table import encode, encode_labels

NAMES = [f"images/{i}.png" for i in range(12)]


def frame() -> pd.DataFrame:
    """Twelve images of two classes by four photographers."""
    return pd.DataFrame(
        {
            "image": NAMES,
            "label": ["finch", "tit"] * 6,
            "colour: red": [1, 0] * 6,
            "colour: blue": [0.0, 1.0] * 6,
            "round": [0.5, None, 1, 0, 0, 1] * 2,
        }
    )


def write(root: Path, table: pd.DataFrame, name: str = "birds.csv") -> Path:
    (root / "images").mkdir(exist_ok=True)
    for i, path in enumerate(NAMES):
        Image.new("RGB", (20, 16), (i * 20, 100, 0)).save(root / path)
    table.to_parquet(root / name) if name.endswith("parquet") else table.to_csv(root / name, index=False)
    return root


def load(root: Path, **options) -> ConceptFolder:
    made = ConceptFolder(str(root), **{"table": "birds.csv", "image_size": 16, **options})
    made.setup()
    return made


def numbers(made: ConceptFolder, split: str) -> list[int]:
    return [int(path.stem) for path in made.splits[split].paths]


@pytest.mark.parametrize("name", ["birds.csv", "birds.parquet"])
def test_table_of_images(tmp_path, name):
    made = load(write(tmp_path, frame(), name), table=name, batch_size=20)
    assert list(made.concept_set) == ["colour: red", "colour: blue", "round"]
    assert made.concept_set.groups == {"colour": ("colour: red", "colour: blue")}
    assert made.class_names == ["finch", "tit"]
    assert {split: len(rows) for split, rows in made.splits.items()} == {"train": 8, "val": 2, "test": 2}
    concepts, labels = made.annotations("train")
    rows = torch.tensor(numbers(made, "train"))
    assert torch.equal(labels, rows % 2)
    expected = torch.tensor(frame().iloc[rows.numpy(), 2:].to_numpy("float32"))
    torch.testing.assert_close(concepts, expected, equal_nan=True)
    batch = next(iter(made.val_dataloader()))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (2, 3, 16, 16), "label": (2,), "concepts": (2, 3), "index": (2,)
    }  # fmt: skip
    assert batch["image"][0, 0, 0, 0].item() * 255 == pytest.approx(numbers(made, "val")[0] * 20)


def test_folder_a_class_with_a_class_table(tmp_path):
    for name, count in (("tit", 3), ("finch", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.jpg")
    pd.DataFrame({"class": ["tit", "finch"], "red": [0, 1], "small": [True, False]}).to_csv(
        tmp_path / "classes.csv", index=False
    )
    made = load(tmp_path, table=None, class_table="classes.csv")
    assert made.class_names == ["tit", "finch"]
    assert list(made.concept_set) == ["red", "small"]
    concepts, labels = made.annotations("train")
    assert torch.equal(concepts, torch.stack([labels, 1 - labels], 1).float())
    assert [path.parent.name for path in made.splits["test"].paths] == ["tit", "finch"]
    (tmp_path / "wren").mkdir()
    with pytest.raises(ValueError, match=r"no row for the folders \['wren'\]"):
        load(tmp_path, table=None, class_table="classes.csv")
    (tmp_path / "wren").rmdir()
    for file in (tmp_path / "tit").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"the folders \['tit'\] .* hold no image"):
        load(tmp_path, table=None, class_table="classes.csv")
    (tmp_path / "tit").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no folder for the classes \['tit'\]; it has \['finch'\]"):
        load(tmp_path, table=None, class_table="classes.csv")


def test_both_tables_take_concepts_from_the_class(tmp_path):
    root = write(tmp_path, frame()[["image", "label"]].assign(**{"certainty:red": [0.25] * 12}))
    pd.DataFrame({"label": ["wren", "tit", "finch"], "red": [0, 0.1, 0.9]}).to_csv(root / "classes.csv", index=False)
    made = load(root, class_table="classes.csv")
    assert made.class_names == ["wren", "tit", "finch"]
    concepts, labels = made.annotations("train")
    assert torch.equal(concepts[:, 0], torch.tensor([0, 0.1, 0.9])[labels])
    assert (made.splits["train"].tensors["certainty"] == 0.25).all()
    pd.DataFrame({"label": ["tit"], "red": [0]}).to_csv(root / "classes.csv", index=False)
    with pytest.raises(ValueError, match=r"birds\.csv, column 'label', row 1: expected one of \['tit'\], got 'finch'"):
        load(root, class_table="classes.csv")


def test_options_name_columns_concepts_and_classes(tmp_path):
    table = frame().rename(columns={"image": "file", "label": "species"}).assign(site=["a", "b", "b"] * 4, note="text")
    root = write(tmp_path, table.assign(weight=np.arange(12) * 1.5))
    (root / "set.json").write_text(json.dumps({"names": ["weight", "round"], "kinds": ["real", "binary"]}))
    made = load(
        root, image_column="file", label_column="species", concepts="set.json", classes=["tit", "finch", "wren"],
        group_column="site",
    )  # fmt: skip
    assert made.num_classes == 3
    assert made.group_names == ["a", "b"]
    assert made.concept_set.kinds == ("real", "binary")
    rows = torch.tensor(numbers(made, "train"))
    assert torch.equal(made.annotations("train")[0][:, 0], rows * 1.5)
    assert torch.equal(made.annotations("train")[1], 1 - rows % 2)
    assert torch.equal(made.splits["train"].tensors["group"], (rows % 3 > 0).long())


def test_certainty_and_masks(tmp_path):
    masks = ["mask.png", None] * 6
    extra = {"certainty:round": [0.0, 0.5, None] * 4, "mask:colour: red": masks}
    root = write(tmp_path, frame().assign(**extra))
    pixels = np.zeros((16, 20), np.uint8)
    pixels[:, 2:10] = 1
    Image.fromarray(pixels).save(root / "mask.png")
    made = load(root)
    assert len(made.concept_set) == 3
    rows = torch.tensor(numbers(made, "test"))
    certainty = made.splits["test"].tensors["certainty"]
    assert torch.equal(certainty[:, 2], torch.tensor([0, 0.5, 1])[rows % 3])
    assert (certainty[:, :2] == 1).all()
    batch = next(iter(made.test_dataloader()))
    seen = batch["concept_masks"]
    assert seen.shape == (2, 3, 16, 16)
    assert torch.equal(seen[:, 0].isnan().all((1, 2)), rows % 2 == 1)
    # the middle 16 of 20 columns are kept
    assert seen[rows % 2 == 0][0, 0].sum(0).tolist() == [16.0] * 8 + [0.0] * 8
    assert seen[:, 1:].isnan().all()
    assert "concept_masks" not in next(iter(made.train_dataloader()))
    assert "concept_masks" in next(iter(load(root, augment=False).train_dataloader()))


def test_split_column(tmp_path):
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    root = write(tmp_path, frame().assign(part=splits))
    made = load(root, split_column="part")
    assert [numbers(made, name) for name in ("train", "val", "test")] == [list(range(8)), [8, 9], [10, 11]]
    root = write(tmp_path, frame().assign(part=["train"] * 10 + ["test"] * 2))
    made = load(root, split_column="part", val_fraction=0.2)
    assert numbers(made, "test") == [10, 11]
    assert len(made.splits["val"]) == 2
    assert sorted(numbers(made, "val") + numbers(made, "train")) == list(range(10))


def test_split_by_keeps_units_whole_and_refuses_a_column_that_does_not(tmp_path):
    table = frame().assign(owner=[f"p{i // 2 % 6}" for i in range(12)], label="bird")
    made = load(write(tmp_path, table), split_by="owner", val_fraction=0.2, test_fraction=0.3)
    owners = [{i // 2 % 6 for i in numbers(made, name)} for name in ("train", "val", "test")]
    assert [len(owner) for owner in owners] == [3, 1, 2]
    assert len(set.union(*owners)) == 6
    root = write(tmp_path, table.assign(part=["train"] * 7 + ["val"] * 3 + ["test"] * 2))
    with pytest.raises(ValueError, match="owner 'p3' is in 'train' and 'val' by column 'part'"):
        load(root, split_by="owner", split_column="part")


def test_empty_split_is_an_error(tmp_path):
    root = write(tmp_path, frame().assign(part="train"))
    with pytest.raises(ValueError, match="the test split of ConceptFolder is empty"):
        load(root, split_column="part")
    with pytest.raises(ValueError, match="the val split of ConceptFolder is empty"):
        load(write(tmp_path, frame()), val_fraction=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": [0, 1, "yes"] * 4}, r"birds\.csv: column 'round', row 3: expected a number, got yes; mend"),
        ({"round": [0, 1.5, 1] * 4}, r"row 2: expected a value in \[0, 1\], got 1\.5; a concept of"),
        ({"round": [0, 1, -1] * 4}, r"column 'round', row 3: expected a value in \[0, 1\], got -1"),
        ({"certainty:round": [2.0] * 12}, r"column 'certainty:round', row 1: expected a value in \[0, 1\]"),
        ({"certainty:rnd": [1.0] * 12}, r"'certainty:rnd' is about no concept of this data; .* \['round'\]"),
        ({"label": ["finch", None] * 6}, "column 'label', row 2: expected a value, got none"),
        ({"image": [NAMES[0], *NAMES[:11]]}, "'images/0.png' is in rows 1 and 2; keep one"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(tmp_path, changes, message):
    root = write(tmp_path, frame().assign(**changes))
    with pytest.raises(ValueError, match=message):
        ConceptFolder(str(root), "birds.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "labels"}, r"birds\.csv has no column 'labels'; did you mean \['label'\]"),
        ({"concepts": ["blue"]}, r"concepts: birds\.csv has no column \['blue'\]"),
        ({"classes": ["finch", "tits"]}, "row 2: expected one of .*, got 'tit'; did you mean 'tits'"),
        ({"classes": ["a", "a"]}, "classes: expected each name once"),
        ({"split_column": "round"}, "column 'round'"),
        ({"val_fraction": 0.8}, "split fractions"),
        ({"table": None}, "table: give a table with a row an image, a class_table"),
        ({"table": None, "class_table": "birds.csv", "split_by": "round"}, r"\['split_by'\] name columns"),
        ({"table": "birds.json"}, "expected .csv or .parquet, got '.json'"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    root = write(tmp_path, frame())
    (root / "birds.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        ConceptFolder(str(root), **{"table": "birds.csv", **options})


def test_missing_files_are_named_and_counted(tmp_path):
    root = write(tmp_path, frame().assign(**{"mask:round": ["a.png", *[None] * 11]}))
    with pytest.raises(FileNotFoundError, match=r"1 of 1 masks are missing, first .*a\.png"):
        ConceptFolder(str(root), "birds.csv")
    (root / NAMES[3]).unlink()
    (root / NAMES[7]).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 12 images are missing, first .*3\.png, .*7\.png"):
        ConceptFolder(str(root), "birds.csv")
    with pytest.raises(FileNotFoundError, match=r"no table at .*none\.csv; expected"):
        ConceptFolder(str(root), "none.csv")


def test_whole_number_labels_are_positions_in_classes():
    assert encode_labels(["1", "0"], ["tit", "finch"], "t").tolist() == [1, 0]
    assert encode_labels(["2", "1"], ["1", "2"], "t").tolist() == [1, 0]  # names come first
    for wrong in ("2", "-1"):
        with pytest.raises(ValueError, match=f"t, row 2: expected 0 to 1, positions in classes, got '{wrong}'"):
            encode_labels(["1", wrong], ["tit", "finch"], "t")
    names, positions = encode(["10", "9", "10"])
    assert names == ["9", "10"]
    assert positions.tolist() == [1, 0, 1]


def test_leading_zeros_stay_in_labels_and_paths(tmp_path):
    root = write(tmp_path, frame().assign(label=["007", "7"] * 6))
    assert load(root).class_names == ["007", "7"]


def test_files_and_spec(tmp_path):
    made = ConceptFolder(str(write(tmp_path, frame())), "birds.csv", concepts=["round"])
    assert len(list(made.files())) == 13
    assert made.spec()["init_args"]["concepts"] == ["round"]


def test_command_line_sees_every_option(tmp_path):
    root = write(tmp_path, frame())
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ConceptFolder, "data")
    arguments = ["table=birds.csv", "concepts=[round]", "batch_size=3", "image_size=20", "augment=false"]
    parsed = parser.parse_args([f"--data.root={root}", *(f"--data.{argument}" for argument in arguments)])
    made = ConceptFolder(**parsed.data.as_dict())
    assert (list(made.concept_set), made.batch_size, made.image_size, made.augment) == (["round"], 3, 20, False)


@pytest.fixture(scope="module")
def signs(shared, tmp_path_factory) -> Path:
    return write_gtsrb_folder(tmp_path_factory.mktemp("signs"), shared / "data" / "gtsrb32", frames_a_track=2)


def test_real_signs_are_split_by_sign(signs):
    made = ConceptFolder(
        str(signs), "signs.csv", concepts="concepts.json", split_column="split", split_by="track", image_size=32
    )
    made.setup()
    assert {name: len(split) for name, split in made.splits.items()} == {"train": 1240, "val": 184, "test": 352}
    tracks = [{path.stem.rpartition("_")[0] for path in split.paths} for split in made.splits.values()]
    assert len(set.union(*tracks)) == sum(map(len, tracks)) == 888
    assert (made.num_classes, len(made.concept_set), len(made.concept_set.groups)) == (43, 49, 9)
    concepts, labels = made.annotations("test")
    assert torch.unique(concepts, dim=0).shape[0] == labels.unique().numel() == 43
    stop = made.class_names.index("stop")
    assert (concepts[:, made.concept_set.index("octagon")] == (labels == stop)).all()
    image = next(iter(made.test_dataloader()))["image"]
    assert image.shape[1:] == (3, 32, 32)
    assert 0.1 < image.std() < 0.4


def test_real_signs_by_class_table_and_drawn_split(signs):
    made = ConceptFolder(str(signs), "signs.csv", class_table="classes.csv", split_by="track", image_size=32)
    made.setup("fit")
    tracks = [{path.stem.rpartition("_")[0] for path in made.splits[name].paths} for name in ("train", "val")]
    assert not tracks[0] & tracks[1]
    assert made.annotations("train")[0].mean().item() == pytest.approx(0.0964, abs=0.002)
