"""CUB200 on a miniature official folder, and on the real tables of all 200 classes where they are."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from cub_tree import write_cub_tree, write_miniature_cub_tree

from cbm_lightning.data import cub
from cbm_lightning.data.cub import CUB200, fetch_archive
from cbm_lightning.data.cub_annotations import (
    attribute_concepts,
    class_votes,
    frequent_attributes,
    read_annotations,
    soften,
)
from cbm_lightning.data.images import plain_transform


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a miniature CUB_200_2011: 4 classes of 10 images."""
    write_miniature_cub_tree(tmp_path)
    return tmp_path


def data(root: Path, **options) -> CUB200:
    made = CUB200(str(root), **{"min_classes": 2, "image_size": 40, **options})
    made.setup()
    return made


def test_votes_leave_out_invisible_noes_and_give_ties_to_yes():
    present = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], np.uint8)
    certainty = np.array([[4, 1, 4, 4], [4, 1, 1, 4], [1, 1, 4, 4]], np.uint8)
    # votes: one yes, one no | none at all | one yes, two noes | three noes; a second class without images
    votes = class_votes(present, certainty, np.array([0, 0, 0]), 2)
    assert votes.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert frequent_attributes(np.array([[1, 1, 0], [1, 0, 0]]), 2) == [0]


def test_soft_labels_follow_the_published_map():
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    assert soften(np.ones((1, 4), np.uint8), codes).tolist() == [[0, 0.5, 0.75, 1]]
    assert soften(np.zeros((1, 4), np.uint8), codes).tolist() == [[0, 0.5, 0.25, 0]]


def test_concepts_have_official_names_groups_and_readable_texts():
    concepts = attribute_concepts(["has_bill_shape::hooked", "has_bill_shape::cone", "has_size::small_(5_-_9_in)"])
    assert concepts.groups == {
        "has_bill_shape": ("has_bill_shape::hooked", "has_bill_shape::cone"),
        "has_size": ("has_size::small_(5_-_9_in)",),
    }
    assert concepts.prompts() == ["hooked bill shape", "cone bill shape", "small (5 - 9 in) size"]


def test_concepts_and_classes_are_known_before_setup(root):
    made = CUB200(str(root), min_classes=2)
    names = ["has_wing_color::red", "has_wing_color::blue", "has_wing_color::not_red"]
    assert list(made.concept_set) == [*names, "has_bill_shape::hooked", "has_tail_shape::forked"]
    assert made.class_names == [f"Painted Bird {letter}" for letter in "ABCD"]
    assert made.num_classes == 4
    assert list(CUB200(str(root), min_classes=3).concept_set) == ["has_bill_shape::hooked", "has_tail_shape::forked"]


def test_root_may_be_the_folder_itself_and_attributes_may_lie_inside(root):
    folder = root / "CUB_200_2011"
    (root / "attributes.txt").rename(folder / "attributes.txt")
    assert len(CUB200(str(folder), min_classes=2).concept_set) == 5


def test_splits_are_official_stratified_and_apart(root):
    made = data(root, val_fraction=0.34)
    assert {name: len(split) for name, split in made.splits.items()} == {"train": 16, "val": 8, "test": 16}
    paths = [path for split in made.splits.values() for path in split.paths]
    assert len(set(paths)) == 40
    assert all(int(path.stem.split("_")[2]) % 3 == 0 for path in made.splits["test"].paths)
    assert torch.bincount(made.annotations("val")[1]).tolist() == [2, 2, 2, 2]
    assert data(root, val_fraction=0.34).splits["val"].paths == made.splits["val"].paths
    assert data(root, val_fraction=0.34, seed=1).splits["val"].paths != made.splits["val"].paths


def test_class_level_concepts_are_those_of_the_class(root):
    concepts, labels = data(root).annotations("test")
    expected = torch.stack([labels % 2, labels // 2, 1 - labels % 2, labels * 0 + 1, labels * 0 + 1], 1)
    assert torch.equal(concepts, expected.float())


def test_instance_and_soft_labels_are_those_of_the_annotators(root):
    hard = data(root, labels="instance").splits["test"]
    number = torch.tensor([int(path.stem.split("_")[2]) for path in hard.paths])
    assert torch.equal(hard.tensors["concepts"][:, 3], (number % 2 == 0).float())
    soft = data(root, labels="soft").splits["test"].tensors["concepts"]
    # within a class test images are 0, 3, 6, 9: all guessing in the bill shape
    assert (soft[:, 3] == 0.5).all()
    assert torch.allclose(hard.tensors["certainty"][:, 3], torch.tensor(1 / 3))
    assert (hard.tensors["certainty"][:, 4] == 0).all()


def test_classes_choose_order_and_need_only_their_images(root):
    shutil.rmtree(root / "CUB_200_2011" / "images" / "001.Painted_Bird_A")
    shutil.rmtree(root / "CUB_200_2011" / "images" / "003.Painted_Bird_C")
    made = data(root, classes=[4, "painted_bird_b"])
    assert made.class_names == ["Painted Bird D", "Painted Bird B"]
    assert len(made.concept_set) == 5
    concepts, labels = made.annotations("test")
    assert labels.bincount().tolist() == [4, 4]
    assert torch.equal(concepts[:, 1], (labels == 0).float())  # only class 4 has blue wings
    assert next(iter(made.test_dataloader()))["image"].shape == (8, 3, 40, 40)
    with pytest.raises(FileNotFoundError, match=r"of the train split are missing, the first is .*Painted_0_1\.png"):
        data(root)


def test_parts_follow_the_transform(root):
    made = data(root, parts=True, image_size=None, eval_transform=plain_transform(80), augment=False)
    assert made.part_names == ["back", "beak"]
    for name in ("train", "test"):
        for item in made.splits[name]:
            x, y, visible = item["parts"][0].round().long().tolist()
            assert visible
            assert item["image"][:, y, x].min() > 0.9  # the white dot
            assert item["parts"][1].tolist() == [0, 0, 0]


def test_batches_have_all_annotation(root):
    batch = next(iter(data(root, batch_size=4).train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {"image": (4, 3, 40, 40), "label": (4,), "concepts": (4, 5), "certainty": (4, 5), "index": (4,)}


def test_files_name_tables_and_kept_images(root):
    files = list(CUB200(str(root), classes=[1], min_classes=2).files())
    assert all(file.is_file() for file in files)
    assert len(files) == 5 + 10


@pytest.mark.parametrize(
    "name", ["images.txt", "classes.txt", "train_test_split.txt", "attributes/image_attribute_labels.txt"]
)
def test_missing_table_is_named(root, name):
    (root / "CUB_200_2011" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"CUB_200_2011 lacks \['{name}'\]; expected the content"):
        CUB200(str(root))


def test_missing_attribute_names_and_missing_folder_say_what_to_do(root, tmp_path):
    (root / "attributes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*attributes\.txt \(here or one folder above\)"):
        CUB200(str(root))
    with pytest.raises(FileNotFoundError, match=r"expected the official CUB_200_2011 folder .* set download: true"):
        CUB200(str(tmp_path / "nowhere"))


def attribute_file(root: Path) -> Path:
    return root / "CUB_200_2011" / "attributes" / "image_attribute_labels.txt"


def test_rows_with_superfluous_fields_are_read(root):
    before = read_annotations(root)
    lines = attribute_file(root).read_text().splitlines()
    lines[7] += " 2 0.5"
    attribute_file(root).write_text("\n".join(lines) + "\n")
    after = read_annotations(root)
    assert (after.present == before.present).all()
    assert (after.certainty == before.certainty).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 1 2 4 1.0", r"row 6 is \[1, 1, 2, 4\]; expected an image"),
        ("999 1 0 4 1.0", r"row 6 is \[999, 1, 0, 4\]"),
        ("1 1 0 0 1.0", r"row 6 is \[1, 1, 0, 0\]"),
        ("1 1 x 4 1.0", "in whole numbers"),
    ],
)
def test_wrong_attribute_rows_are_named(root, line, message):
    lines = attribute_file(root).read_text().splitlines()
    lines[5] = line
    attribute_file(root).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_annotations(root)


def test_cut_off_attribute_file_is_noticed(root):
    lines = attribute_file(root).read_text().splitlines()
    attribute_file(root).write_text("\n".join(lines[:-10]))
    with pytest.raises(ValueError, match="10 of 240 pairs of image and attribute have no row, the first is image 39"):
        read_annotations(root)


def test_cut_off_small_tables_are_noticed(root):
    split = root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text("".join(f"{i} 1\n" for i in range(1, 31)))
    with pytest.raises(
        ValueError, match=r"train_test_split\.txt: 10 images of images\.txt have no row, the first is 31"
    ):
        read_annotations(root)


def test_missing_parts_are_named(root):
    (root / "CUB_200_2011" / "parts" / "part_locs.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"parts: expected .*part_locs\.txt"):
        data(root, parts=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "hard"}, "labels: expected 'class', 'instance' or 'soft', got 'hard'"),
        ({"val_fraction": 0.0}, "val_fraction: expected a share between 0 and 1"),
        ({"classes": [1, 1]}, "classes: expected at least one class and each once"),
        ({"classes": [5]}, r"classes: no class is called \[5\]; expected 1 to 4"),
        ({"min_classes": 5}, "min_classes: no attribute holds in 5 classes"),
    ],
)
def test_wrong_options_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        data(root, **options)


def pack(root: Path, archive: Path) -> str:
    """Pack a tree as the official archive is packed, and return its checksum."""
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("attributes.txt", "CUB_200_2011"):
            tar.add(root / name, arcname=name)
    return hashlib.md5(archive.read_bytes()).hexdigest()


def test_download_verifies_and_unpacks_once(root, tmp_path, monkeypatch):
    archive = tmp_path / "archive.tgz"
    monkeypatch.setattr(cub, "ARCHIVE_MD5", pack(root, archive))
    monkeypatch.setattr(cub, "ARCHIVE_URL", archive.as_uri())
    made = CUB200(str(tmp_path / "fresh"), min_classes=2, image_size=40, download=True)
    assert len(made.concept_set) == 5  # asked for before prepare_data
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["CUB_200_2011"]
    archive.unlink()
    made.prepare_data()
    made.setup()
    assert len(made.splits["test"]) == 16


def test_download_of_a_damaged_archive_leaves_nothing(root, tmp_path):
    archive = tmp_path / "archive.tgz"
    md5 = pack(root, archive)
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"expected a file with MD5 {md5}, got"):
        fetch_archive(archive.as_uri(), md5, tmp_path / "fresh")
    assert list((tmp_path / "fresh").iterdir()) == []


def test_second_download_at_the_same_time_keeps_the_first(root, tmp_path):
    archive = tmp_path / "archive.tgz"
    md5 = pack(root, archive)
    fetch_archive(archive.as_uri(), md5, tmp_path / "fresh")
    fetch_archive(archive.as_uri(), md5, tmp_path / "fresh")
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["CUB_200_2011"]


def test_download_without_a_network_says_what_to_do(tmp_path):
    with pytest.raises(ConnectionError, match=r"fetch CUB_200_2011\.tgz by hand, unpack it into root"):
        fetch_archive((tmp_path / "none.tgz").as_uri(), "", tmp_path / "fresh")


def test_command_line_sees_every_option(root):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(CUB200, "data")
    arguments = [
        "classes=[1, Painted_Bird_C]",
        "batch_size=3",
        "image_size=20",
        "augment=false",
        "labels=soft",
        "seed=4",
    ]
    parsed = parser.parse_args([f"--data.root={root}", *(f"--data.{argument}" for argument in arguments)])
    made = CUB200(**parsed.data.as_dict())
    assert (made.classes, made.batch_size, made.image_size, made.augment) == ([1, "Painted_Bird_C"], 3, 20, False)
    assert made.spec()["init_args"]["seed"] == 4


def test_command_line_takes_a_transform(root):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(CUB200, "data")
    crop = {"class_path": "torchvision.transforms.v2.CenterCrop", "init_args": {"size": 5}}
    init_args = {"root": str(root), "eval_transform": crop}
    spec = {"class_path": "cbm_lightning.data.cub.CUB200", "init_args": init_args}
    assert parser.parse_object({"data": spec}).data.init_args.eval_transform.init_args.size == 5


@pytest.fixture(scope="module")
def real_root(shared, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cub")
    write_cub_tree(root, shared / "data" / "cub10")
    return root


def test_real_tables_give_the_published_concepts(real_root, shared):
    published = np.load(shared / "data" / "cub10" / "cub200_class_attributes.npz")
    made = CUB200(str(real_root), classes=list(range(1, 11)))
    tables = made.tables
    assert tables.present.shape == (11788, 312)
    assert tables.official_train.sum() == 5994
    train = tables.official_train
    votes = class_votes(tables.present[train], tables.certainty[train], tables.labels[train], 200)
    assert frequent_attributes(votes) == published["attr_index_112"].tolist()
    assert (votes[:, published["attr_index_112"]] == published["class_attr_112"]).all()
    assert (len(made.concept_set), len(made.concept_set.groups)) == (112, 28)
    assert made.class_names[0] == "Black footed Albatross"


def test_real_certainty_codes_are_kept(real_root, shared):
    known = np.load(shared / "data" / "cub10" / "cub200_koh_val_split.npz")
    tables = read_annotations(real_root)
    row_of = {path: i for i, path in enumerate(tables.paths)}
    assert (tables.certainty[[row_of[path] for path in known["img_path"]]] == known["certainty_312"]).all()
    assert not tables.present[tables.certainty == 1].any()


def test_real_photographs_load_with_their_parts(real_root):
    made = CUB200(str(real_root), classes=list(range(1, 11)), parts=True, image_size=96, batch_size=16)
    made.setup()
    assert {name: len(split) for name, split in made.splits.items()} == {"train": 240, "val": 60, "test": 243}
    batch = next(iter(made.test_dataloader()))
    assert batch["image"].shape == (16, 3, 96, 96)
    assert batch["image"].std() > 0.1
    assert batch["parts"].shape == (16, 15, 3)
    assert 0.5 < batch["parts"][..., 2].mean() < 0.95
    points = batch["concept_points"]
    assert points.shape == (16, 112, 2)
    shown = ~points.isnan().any(2)
    assert not shown[batch["concepts"] == 0].any()
    beak = made.part_names.index("beak")
    bill = made.concept_set.names.index("has_bill_shape::hooked_seabird")
    here = shown[:, bill]
    assert here.any()
    assert torch.equal(here, (batch["concepts"][:, bill] == 1) & (batch["parts"][:, beak, 2] == 1))
    assert torch.equal(points[here, bill], batch["parts"][here, beak, :2])
    concepts, labels = made.annotations("train")
    assert torch.unique(concepts, dim=0).shape[0] == 10
    assert (concepts.std(0) > 0).sum() == 58  # only these vary within ten classes
    assert labels.bincount().tolist() == [24] * 10
