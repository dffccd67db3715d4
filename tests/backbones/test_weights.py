"""Local weight files: the formats that are read, and what is said of files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cbm_lightning.backbones.timm import TimmBackbone
from cbm_lightning.backbones.weights import read_weights


def trained_weights(name: str = "test_resnet", **options: int) -> dict[str, Tensor]:
    """A state dict as timm saves it, classifier included."""
    import timm

    return timm.create_model(name, num_classes=7, **options).state_dict()


@pytest.mark.parametrize("container", ["safetensors", "bare", "state_dict", "state_dict_ema", "model"])
def test_formats(tmp_path: Path, container: str) -> None:
    weights = trained_weights()
    if container == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, path)
    else:
        path = tmp_path / "weights.pth"
        torch.save(weights if container == "bare" else {container: weights, "epoch": 3}, path)
    backbone = TimmBackbone("test_resnet", checkpoint_path=str(path), img_size=64)
    loaded = backbone.model.state_dict()
    assert not any(key.startswith("fc.") for key in loaded)
    for key in loaded:
        torch.testing.assert_close(loaded[key], weights[key], atol=1e-3, rtol=1e-3)
        assert loaded[key].dtype == weights[key].dtype


def test_position_embedding_of_another_size_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = trained_weights("test_vit")
    save_file(weights, path)
    backbone = TimmBackbone("test_vit", checkpoint_path=str(path), img_size=64)
    assert weights["pos_embed"].shape == (1, 101, 64)
    assert backbone.model.pos_embed.shape == (1, 17, 64)
    assert torch.equal(backbone.model.pos_embed[:, 0], weights["pos_embed"][:, 0])
    assert torch.equal(backbone.model.norm.weight, weights["norm.weight"])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(trained_weights("test_vit"), path)
    with pytest.raises(ValueError, match=r"does not fit test_resnet: \d+ missing \(conv1.*, \.\.\.\); \d+ unexpected"):
        TimmBackbone("test_resnet", checkpoint_path=str(path), img_size=64)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = trained_weights()
    weights["conv1.0.weight"] = weights["conv1.0.weight"][:3]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"1 of another shape \(conv1\.0\.weight \[3, "):
        TimmBackbone("test_resnet", checkpoint_path=str(path), img_size=64)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    weights = {"weight": torch.rand(1000)}
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint_path: .*weights.* cannot be read .* truncated"):
        read_weights(path)


def test_files_that_hold_no_tensors(tmp_path: Path) -> None:
    code = tmp_path / "code.pth"
    torch.save({"state_dict": {"weight": Path("x")}}, code)  # needs pickled code
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(code)
    numbers = tmp_path / "numbers.pth"
    torch.save({"epoch": 3}, numbers)
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(numbers)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path: no file at .*nowhere\.pth"):
        TimmBackbone("test_resnet", checkpoint_path=str(tmp_path / "nowhere.pth"), img_size=64)
