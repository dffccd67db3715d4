"""What a user sees of bad input: ``cbm fit`` names field, value and remedy, and leaves no half-written file behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cub_tree import write_miniature_cub_tree
from PIL import Image

from cbm_lightning.batches import check_concepts, check_labels
from cbm_lightning.cli import main
from cbm_lightning.concepts import ConceptSet

QUIET = ["accelerator=cpu", "max_epochs=1", "enable_progress_bar=false", "enable_model_summary=false", "logger=false"]
FIT = ["fit", *(f"--trainer.{option}" for option in QUIET)]
TIMM = ["--model=CBMModule", "--model.backbone=TimmBackbone", "--model.backbone.name=test_resnet.r160_in1k"]
TIMM += ["--model.backbone.img_size=32"]
TOY = ["--model=CBMModule", "--model.backbone=toy.ToyBackbone", "--model.backbone.width=8"]
FOREIGN = [*TOY, "--data=toy.ForeignData", "--model.concepts=4", "--model.num_classes=3"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import toy  # noqa: F401  the CLI finds classes that are imported, or importable by path

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["cbm"])
    return tmp_path


@pytest.fixture
def refuse(folder: Path) -> Callable[..., None]:
    """Run a command that has to fail; check the message, and that no more than a whole configuration was written."""

    def run(arguments: list[str], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            main(arguments)
        for left in (folder / "work").rglob("*"):
            assert left.name == "config.yaml"
            assert set(yaml.safe_load(left.read_text())) >= {"data", "model", "trainer"}

    return run


def write_images(folder: Path, column: list[object], labels: list[object] | None = None) -> list[str]:
    """Twelve images and a table with the concept ``round``, and the flags that read them."""
    lines = ["image,label,round,red"]
    for i, (value, label) in enumerate(zip(column, labels or ["apple", "stone"] * 6, strict=True)):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{label},{value},{i % 3 % 2}")
    (folder / "table.csv").write_text("\n".join(lines))
    sizes = ["--data.batch_size=4", "--data.val_fraction=0.25", "--data.test_fraction=0.25"]
    return ["--data=ConceptFolder", f"--data.root={folder}", "--data.table=table.csv", *sizes]


def config(folder: Path, data: dict, **model: object) -> list[str]:
    """A configuration file as a flag."""
    written = {"model": {"class_path": "CBMModule", "init_args": model}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    return ["--config", str(folder / "config.yaml")]


def test_good_input_is_accepted(folder: Path) -> None:
    main([*FIT, *TIMM, *write_images(folder, [0, 1] * 6)])


def test_a_missing_image(folder: Path, refuse: Callable[..., None]) -> None:
    data = write_images(folder, [0, 1] * 6)
    (folder / "3.png").unlink()
    refuse([*FIT, *TIMM, *data], FileNotFoundError, r"1 of 12 images are missing, first .*3\.png")


def test_a_damaged_image(folder: Path, refuse: Callable[..., None]) -> None:
    data = write_images(folder, [0, 1] * 6)
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    refuse([*FIT, *TIMM, *data], ValueError, r"cannot read the image .*\.png: .*; replace the file or leave it out")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", r"table\.csv: column 'round', row 3: expected a number, got yes; mend the value"),
        (1.5, r"table\.csv: column 'round', row 3: expected a value in \[0, 1\], got 1\.5; a concept of kind real"),
        (-0.1, r"table\.csv: column 'round', row 3: expected a value in \[0, 1\], got -0\.1"),
    ],
)
def test_a_concept_that_is_no_number_or_outside_zero_and_one(
    value: object, message: str, folder: Path, refuse: Callable[..., None]
) -> None:
    refuse([*FIT, *TIMM, *write_images(folder, [0, 1, value, *[0, 1, 0] * 3])], ValueError, message)


def test_labels_out_of_range_in_a_table(folder: Path, refuse: Callable[..., None]) -> None:
    data = write_images(folder, [0, 1] * 6, labels=[0, 1, 2] * 4)
    message = r"table\.csv, column 'label', row 3: expected 0 to 1, positions in classes, got '2'"
    refuse([*FIT, *TIMM, *data, '--data.classes=["apple","stone"]'], ValueError, message)


def test_labels_out_of_range_in_batches(refuse: Callable[..., None]) -> None:
    message = r"label: expected values from 0 to 1 \(2 classes\), got 0 to 2"
    refuse([*FIT, *FOREIGN, "--model.num_classes=2"], ValueError, message)


def test_labels_and_features_that_do_not_fit_in_a_file(folder: Path, refuse: Callable[..., None]) -> None:
    rows = {"embedding": np.ones((8, 3), np.float32), "label": np.arange(8) % 4, "concepts": np.ones((8, 2))}
    data = ["--data=PrecomputedFeatures", f"--data.path={folder / 'a.npz'}", "--model=CBMModule"]
    np.savez(folder / "a.npz", **rows)
    message = r"label: expected 0 to 1 for the classes \['a', 'b'\], got \[2, 3\]"
    refuse([*FIT, *data, "--model.backbone=identity", '--data.classes=["a","b"]'], ValueError, message)
    np.savez(folder / "a.npz", **{**rows, "concepts": rows["concepts"] * 2})
    message = r"concepts: expected values in \[0, 1\], got 2 for 'concept_0' in row 0"
    refuse([*FIT, *data, "--model.backbone=identity"], ValueError, message)


def test_a_number_of_concepts_that_does_not_fit_the_model(refuse: Callable[..., None]) -> None:
    message = "the model has 5 concepts, ToyData has 4; pass the datamodule's concept set"
    refuse([*FIT, *TOY, "--data=toy.ToyData", "--model.concepts=5"], ValueError, message)
    message = r"concepts: the model has 5 concepts, the batch has the shape \[16, 4\]"
    refuse([*FIT, *FOREIGN, "--model.concepts=5"], ValueError, message)


def test_an_unknown_timm_name(refuse: Callable[..., None]) -> None:
    arguments = [*FIT, *TIMM, "--data=RenderedBirds"]
    message = r"name: timm has no model 'mobilenetv3_smal_050'; did you mean \['mobilenetv3_small_050'"
    refuse([*arguments, "--model.backbone.name=mobilenetv3_smal_050"], ValueError, message)
    refuse(
        [*FIT, "--model=CBMModule", "--model.backbone=timm/mobilenetv3_smal_050", *arguments[-1:]], ValueError, message
    )


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_corrupt_cache_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path) -> None:
    birds = {"class_path": "RenderedBirds", "init_args": {"num_train": 24, "num_val": 8, "num_test": 8, "size": 32}}
    cached = {"data": birds, "backbone": "timm/test_resnet", "cache_dir": str(folder / "cache")}
    arguments = config(folder, {"class_path": "CachedFeatures", "init_args": cached}, backbone="identity")
    arguments.append("--trainer.enable_checkpointing=false")
    expected = main([*FIT, *arguments]).trainer.callback_metrics
    files = {path: path.read_bytes() for path in (folder / "cache").iterdir()}
    assert sorted(path.name.partition("-")[0] for path in files) == ["test", "train", "val"]
    for path, whole in files.items():
        path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="encoding again"):
        found = main([*FIT, *arguments]).trainer.callback_metrics
    assert {path: path.read_bytes() for path in (folder / "cache").iterdir()} == files
    assert found == expected


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint(command: str, share: float, folder: Path, refuse: Callable[..., None]) -> None:
    arguments = [*TOY, "--data=toy.ToyData", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    main([*FIT, *arguments, f"--trainer.default_root_dir={folder}"])
    (whole,) = folder.rglob("*.ckpt")
    content = whole.read_bytes()
    broken = folder / "broken.ckpt"
    broken.write_bytes(content[: int(share * len(content))])
    refuse([command, *arguments, f"--ckpt_path={broken}"], ValueError, r"broken\.ckpt is truncated or not a checkpoint")
    assert whole.read_bytes() == content


def test_a_checkpoint_that_is_not_there(folder: Path, refuse: Callable[..., None]) -> None:
    arguments = ["test", *TOY, "--data=toy.ToyData", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    refuse([*arguments, f"--ckpt_path={folder / 'none.ckpt'}"], FileNotFoundError, r"none\.ckpt")


def test_a_cub_folder_with_a_missing_file(folder: Path, refuse: Callable[..., None]) -> None:
    root = write_miniature_cub_tree(folder)
    arguments = [*FIT, *TIMM, "--data=CUB200", f"--data.root={root}", "--data.min_classes=1"]
    image = next((root / "images").rglob("*.png"))
    content = image.read_bytes()
    image.unlink()
    refuse(arguments, FileNotFoundError, rf"1 of \d+ images of the \w+ split are missing, the first is .*{image.name}")
    image.write_bytes(content)
    (root / "train_test_split.txt").unlink()
    message = r"CUB_200_2011 lacks \['train_test_split\.txt'\]; expected the content of the official"
    refuse(arguments, FileNotFoundError, message)


def test_an_empty_split(folder: Path, refuse: Callable[..., None]) -> None:
    data = write_images(folder, [0, 1] * 6)
    message = "the val split of ConceptFolder is empty; check its split options"
    refuse([*FIT, *TIMM, *data, "--data.val_fraction=0"], ValueError, message)
    # the run would end with a test, so its split is looked at before training
    message = "the test split of ConceptFolder is empty; check its split options"
    refuse([*FIT, *TIMM, *data, "--data.test_fraction=0"], ValueError, message)
    message = "the train split of RenderedBirds is empty"
    refuse([*FIT, *TIMM, "--data=RenderedBirds", "--data.num_train=0"], ValueError, message)


def test_a_batch_without_concepts(refuse: Callable[..., None]) -> None:
    message = (
        r"the batch has no 'concepts', only \['image', 'label'\], but this bottleneck learns from annotated concepts"
    )
    refuse([*FIT, *FOREIGN, "--data.with_concepts=false"], ValueError, message)


CORRECT = [*FIT, *TOY, "--data=toy.ToyData", "--trainer.callbacks+=InterventionEvaluation"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("policies=[rand,upc]", r"policies: nothing is called 'upc'; did you mean 'ucp'\?"),
        ("policies=[ucp,ucp]", r"policies: several are called \['ucp'\]; give each a label of its own"),
        ("values=percentiles", r"values: nothing is called 'percentiles'; did you mean 'percentile'\?"),
        ('unit={"a":["red","wet"]}', r"cover each of the 4 concepts once; in no group are \['round', 'small'\]"),
        ('unit={"a":["red","wett"]}', r"no concept is called 'wett'; did you mean .*'wet'"),
        ("competence=1.5", r"competence: expected probabilities in \[0, 1\], got 1\.5"),
        ("budgets=[9]", r"budgets: expected numbers of units from 0 to 4, or fractions in \[0, 1\], got 9"),
        ("budgets=[1.5]", r"budgets: expected numbers of units .* or fractions in \[0, 1\], got 1\.5"),
    ],
)
def test_interventions_that_do_not_fit(option: str, message: str, refuse: Callable[..., None]) -> None:
    # the curves are those of the test after the training, and the error comes before it
    refuse([*CORRECT, f"--trainer.callbacks.{option}"], ValueError, message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("unit=concepts", "Expected a typing.Literal['concept', 'group']"),
        ("stages=[train]", "Expected a typing.Literal['val', 'test']. Got value: train"),
        ("competence=often", "Given value: often"),
        (
            'policies=[{"class_path":"torch.nn.Identity"}]',
            "Import path torch.nn.Identity does not correspond to a subclass of Policy",
        ),
        (
            'values={"class_path":"torch.nn.Identity"}',
            "Import path torch.nn.Identity does not correspond to a subclass of InterventionValues",
        ),
    ],
)
def test_interventions_of_another_type(
    option: str, message: str, refuse: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    refuse([*CORRECT, f"--trainer.callbacks.{option}"], SystemExit, "2")
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:cbm test without --ckpt_path judges the weights")
def test_interventions_where_nothing_is_annotated(folder: Path, refuse: Callable[..., None]) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 16), np.float32)
    np.savez(folder / "clip.npz", embedding=rows, label=np.arange(40) % 2, text_embeddings=rows[:5])
    arguments = ["--config", "clip_similarity", "--config", "intervene", f"--data.path={folder / 'clip.npz'}"]
    quiet = [f"--trainer.{option}" for option in QUIET]
    # the datamodule fills in NaN
    message = "Intervention curves need annotated concepts"
    refuse(["test", *arguments, *quiet], ValueError, message)


BIRDS = ["RenderedBirds", *(f"num_{split}=6" for split in ("train", "val", "test")), "size=32", "masks=true"]
LOCATE = [*FIT, *TIMM, f"--data={BIRDS[0]}", *(f"--data.{option}" for option in BIRDS[1:])]
LOCATE += ["--trainer.callbacks+=ConceptSaliency"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method=gradcam", r"method: nothing is called 'gradcam'; did you mean 'grad_cam'\?"),
        ("metrics=[energy]", r"metrics: nothing is called 'energy'; did you mean 'energy_in_mask'\?"),
        ('metrics={"pointing_game":{"tol":1}}', "metrics: pointing_game takes no {'tol': 1}"),
        ('metrics={"iou_at_mass":{"mass":2}}', r"iou_at_mass .* mass: expected a share in \(0, 1\], got 2"),
        (
            "metrics=[keypoint_distance]",
            "keypoint_distance needs concept_points in the batch; CBMModule and a batch of .*image",
        ),
        ('concepts=["crest: presentt"]', r"no concept is called 'crest: presentt'; did you mean \['crest: present'"),
        ("max_images=-1", "max_images: expected at least 0, got -1"),
        ("method=attention_rollout", "attention_rollout needs a vision transformer .* use grad_cam"),
    ],
)
def test_saliency_that_does_not_fit(option: str, message: str, refuse: Callable[..., None]) -> None:
    refuse([*LOCATE, f"--trainer.callbacks.{option}"], ValueError, message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("stages=[train]", "Expected a typing.Literal['val', 'test']. Got value: train"),
        ("counted=both", "Expected a typing.Literal['present', 'predicted']. Got value: both"),
        (
            'method={"class_path":"torch.nn.Identity"}',
            "Import path torch.nn.Identity does not correspond to a subclass of SaliencyMethod",
        ),
    ],
)
def test_saliency_of_another_type(
    option: str, message: str, refuse: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    refuse([*LOCATE, f"--trainer.callbacks.{option}"], SystemExit, "2")
    assert message in capsys.readouterr().err


def test_saliency_of_features_without_images(folder: Path, refuse: Callable[..., None]) -> None:
    rows = {"embedding": np.ones((20, 3), np.float32), "label": np.arange(20) % 2, "concepts": np.ones((20, 2))}
    np.savez(folder / "rows.npz", **rows)
    data = ["--data=PrecomputedFeatures", f"--data.path={folder / 'rows.npz'}", "--model=CBMModule"]
    message = r"image: .*\['concepts', 'embedding', .*'label'\]"
    refuse([*FIT, *data, "--model.backbone=identity", "--trainer.callbacks+=ConceptSaliency"], ValueError, message)


def test_numbers_that_compare_with_nothing() -> None:
    with pytest.raises(ValueError, match=r"label: expected values from 0 to 1 \(2 classes\), got nan to nan"):
        check_labels(torch.tensor([1.0, torch.nan]), 2, "binary")
    size = ConceptSet(["size"], kinds="real")
    check_concepts(torch.tensor([[7.0], [torch.nan]]), size)
    with pytest.raises(ValueError, match=r"got inf for 'size'"):
        check_concepts(torch.tensor([[7.0], [torch.inf]]), size)


def test_the_error_that_is_shown_is_the_one_that_helps(folder: Path, refuse: Callable[..., None]) -> None:
    """Not the error beneath, from which it was raised or which it replaced."""
    data = write_images(folder, [0, 1] * 6)
    groups = '{"names": ["round", "red"], "groups": {"shape": ["roundd"]}}'
    refuse([*FIT, *TIMM, *data, f"--data.concepts={groups}"], ValueError, "no concept is called 'roundd'; did you mean")
    (folder / "table.csv").write_text('image,label,round\n"0.png,apple,0\n')
    refuse([*FIT, *TIMM, *data], ValueError, r"cannot read the table .*table\.csv")
