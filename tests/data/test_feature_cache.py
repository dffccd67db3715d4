"""Files of cached features: content keys, streaming, verification, and what a failure leaves behind."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cbm_lightning.data.feature_cache import CorruptCacheError, as_float32, content_key, read, verify, write

COLUMNS = {
    "embedding": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).half(),
    "label": torch.arange(7),
    "seen": torch.arange(7) % 2 == 0,
}


def batches(size=3):
    for start in range(0, 7, size):
        yield {name: column[start : start + size] for name, column in COLUMNS.items()}


def test_read_returns_what_was_written(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    write(path, "k", 7, batches())
    verify(path, "k")
    for found in (read(path, "k"), load_file(path)):
        assert set(found) == set(COLUMNS)
        assert all(
            torch.equal(found[name], column) and found[name].dtype == column.dtype for name, column in COLUMNS.items()
        )
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_the_file_is_the_same_for_any_batch_size(tmp_path):
    for size in (1, 7):
        write(tmp_path / f"{size}", "k", 7, batches(size))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "7").read_bytes()


def test_key_tells_apart_what_differs():
    tensor = torch.zeros(4)
    values = [
        tensor,
        tensor.view(2, 2),
        tensor.double(),
        tensor + 1,
        "4",
        4,
        ["ab", "c"],
        ["a", "bc"],
        {"a": 1},
        ["a", 1],
    ]
    assert len({content_key(value) for value in values}) == len(values)
    assert content_key({"a": [tensor, torch.tensor(True)]}) == content_key({"a": [torch.zeros(4), torch.tensor(True)]})
    assert content_key(torch.zeros(0)) != content_key(torch.zeros(0, 2))
    assert content_key(torch.arange(6).view(2, 3).T) == content_key(torch.arange(6).view(2, 3).T.contiguous())


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:20], lambda b: b"", lambda b: b[:-1] + b"\x07"])
def test_verify_finds_damage(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write(path, "k", 7, batches())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptCacheError, match=r"a\.safetensors"):
        verify(path, "k")


def test_read_refuses_another_key_and_a_missing_file(tmp_path):
    write(tmp_path / "a", "k", 7, batches())
    with pytest.raises(CorruptCacheError, match="key k, expected other"):
        read(tmp_path / "a", "other")
    with pytest.raises(FileNotFoundError, match="no cached features"):
        read(tmp_path / "b", "k")


def interrupted():
    yield from list(batches())[:1]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("rows", "source", "error"),
    [
        (8, batches(), "expected 8 in all, the batches hold 7"),
        (7, [], "the batches hold 0"),
        (7, [next(batches()), {"label": torch.arange(4)}], "'embedding', 'seen'"),
        (7, interrupted(), None),
        (7, [{"embedding": torch.zeros(7, dtype=torch.complex64)}], "complex64"),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, rows, source, error):
    write(tmp_path / "a", "k", 7, batches())
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(KeyboardInterrupt if error is None else ValueError, match=error):
        write(tmp_path / "a", "k", rows, source)
    assert (tmp_path / "a").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_as_float32_changes_features_only():
    found = as_float32(COLUMNS)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "embedding": torch.float32,
        "label": torch.int64,
        "seen": torch.bool,
    }
