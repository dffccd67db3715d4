"""Embeddings that exist already: formats, splits, names, and what bad arrays are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skin_embeddings import write_skin_embeddings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cbm_lightning.data.feature_cache import write
from cbm_lightning.data.precomputed_features import PrecomputedFeatures


def arrays(n=60, d=5, k=3, **changes):
    rng = np.random.default_rng(0)
    made = {
        "embedding": rng.normal(size=(n, d)).astype(np.float32),
        "label": np.arange(n) % 4,
        "concepts": rng.integers(0, 2, (n, k)).astype(np.float32),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


@pytest.fixture
def saved(tmp_path):
    def save(name="a.npz", **changes):
        np.savez(tmp_path / name, **arrays(**changes))
        return str(tmp_path / name)

    return save


def test_batches_hold_what_the_file_holds(saved):
    concepts = arrays()["concepts"]
    concepts[0, 1] = np.nan
    data = PrecomputedFeatures(saved(concepts=concepts, split=np.zeros(60, int), group=np.arange(60)), batch_size=60)
    batch = data.make_split("train").__getitems__(list(range(60)))
    assert torch.equal(batch["embedding"], torch.from_numpy(arrays()["embedding"]))
    assert torch.equal(batch["concepts"].nan_to_num(9), torch.from_numpy(concepts).nan_to_num(9))
    assert torch.equal(batch["label"], torch.arange(60) % 4)
    assert torch.equal(batch["group"], torch.arange(60))
    assert (data.feature_dim, data.num_classes, data.class_names) == (5, 4, ["0", "1", "2", "3"])
    assert data.concept_set.names == ("concept_0", "concept_1", "concept_2")


def test_fractions_are_stratified_and_repeatable(saved):
    path = saved(n=200)
    splits = []
    for seed in (0, 0, 1):
        data = PrecomputedFeatures(path, seed=seed)
        data.setup()
        splits.append(data)
    for name, count in {"train": 35, "val": 5, "test": 10}.items():
        assert torch.bincount(splits[0].annotations(name)[1]).tolist() == [count] * 4
        rows = [data.splits[name].tensors["embedding"] for data in splits]
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], rows[2])
    together = torch.cat([splits[0].splits[name].tensors["embedding"][:, 0] for name in ("train", "val", "test")])
    assert torch.equal(together.sort().values, torch.from_numpy(arrays(n=200)["embedding"][:, 0]).sort().values)


@pytest.mark.parametrize("split", [[0, 0, 1, 2, -1, 0], ["train", "train", "val", "test", "", "train"]])
def test_a_split_array_decides(saved, split):
    data = PrecomputedFeatures(saved(split=np.resize(np.array(split), 60)))
    data.setup()
    assert {name: len(dataset) for name, dataset in data.splits.items()} == {"train": 30, "val": 10, "test": 10}


def test_an_empty_split_is_refused(saved):
    with pytest.raises(ValueError, match="test split of PrecomputedFeatures is empty"):
        PrecomputedFeatures(saved(split=np.arange(60) % 2)).setup("test")


def test_one_file_a_split(saved):
    paths = {"train": saved("a.npz", split=np.zeros(60, int)), "val": saved("b.npz", n=20)}
    data = PrecomputedFeatures(paths)
    data.setup("fit")
    assert [len(data.splits[name]) for name in paths] == [60, 20]
    with pytest.raises(ValueError, match="no file for the test split"):
        data.setup("test")
    with pytest.raises(ValueError, match="same arrays and widths"):
        PrecomputedFeatures({"train": saved("a.npz"), "val": saved("b.npz", d=6)})


def test_safetensors_with_tokens_in_half_precision(tmp_path):
    tokens = torch.randn(40, 4, 6).half()
    save_file({"tok": tokens, "label": torch.arange(40) % 2}, tmp_path / "a.safetensors")
    data = PrecomputedFeatures(str(tmp_path / "a.safetensors"), {"tokens": "tok"}, concepts=["red", "round"])
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["tokens"].dtype == batch["embedding"].dtype == torch.float32
    assert torch.allclose(batch["embedding"], batch["tokens"].mean(1), atol=1e-6)
    assert batch["concepts"].shape == (len(batch["label"]), 2)
    assert batch["concepts"].isnan().all()


def test_names_and_text_vectors_come_from_the_file(saved):
    texts = np.eye(3, 5, dtype=np.float32)
    path = saved(
        text_embeddings=texts,
        concept_names=np.array(["a", "b", "c"]),
        class_names=np.array(list("pqrs")),
        concepts=None,
    )
    data = PrecomputedFeatures(path)
    assert data.concept_set.names == ("a", "b", "c")
    assert data.class_names == list("pqrs")
    assert torch.equal(data.concept_set.embeddings, torch.from_numpy(texts))
    named = PrecomputedFeatures(path, concepts={"names": ["x", "y", "z"], "groups": {"g": ["x", "y"]}})
    assert named.concept_set.groups == {"g": ("x", "y")}
    assert torch.equal(named.concept_set.embeddings, torch.from_numpy(texts))


def test_it_is_recorded_and_reads_cache_files(tmp_path):
    rows = {name: torch.from_numpy(array) for name, array in arrays().items()}
    write(tmp_path / "a.safetensors", "k", 60, [rows])
    data = PrecomputedFeatures(str(tmp_path / "a.safetensors"), batch_size=8)
    assert data.spec()["init_args"]["path"] == str(tmp_path / "a.safetensors")
    data.setup("fit")
    assert len(data.splits["train"]) == 40


BAD_EMBEDDING = arrays()["embedding"].copy()
BAD_EMBEDDING[7, 2] = np.nan
HIGH_CONCEPT = arrays()["concepts"].copy()
HIGH_CONCEPT[5, 1] = 1.5


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"label": None}, {}, KeyError, r"lacks \['label'\], it has \['concepts', 'embedding'\]"),
        ({"embedding": None}, {}, KeyError, r"embedding \(or tokens\)"),
        ({}, {"arrays": {"embedings": "x"}}, ValueError, "arrays: expected the keys"),
        ({}, {"arrays": {"embedding": "x"}}, KeyError, r"lacks \['x \(or tokens\)'\]"),
        ({"label": np.arange(59)}, {}, ValueError, "embedding: expected .N, D. with N=59"),
        ({"embedding": np.zeros((60, 5, 1))}, {}, ValueError, r"embedding: expected \[N, D\] with N=60"),
        ({"embedding": BAD_EMBEDDING}, {}, ValueError, "embedding: expected finite .* 1 rows .* first is 7"),
        ({"concepts": HIGH_CONCEPT}, {}, ValueError, "1.5 for 'concept_1' in row 5"),
        ({}, {"classes": ["a", "b"]}, ValueError, r"label: expected 0 to 1 .* got \[2, 3\]"),
        ({"label": np.arange(60) - 1}, {}, ValueError, r"label: .* got \[-1\]"),
        ({"label": np.arange(60) / 2}, {}, ValueError, "label: expected integers"),
        ({"label": np.array(["a"] * 60)}, {}, ValueError, "label: expected numbers"),
        ({}, {"concepts": ["a", "b"]}, ValueError, r"expected 2 columns .* got \[3\]"),
        ({"concepts": None}, {}, ValueError, "neither concepts nor text_embeddings"),
        ({"text_embeddings": np.zeros((4, 5))}, {}, ValueError, "4"),
        ({"text_embeddings": np.full((3, 5), np.inf)}, {}, ValueError, "text_embeddings: expected finite"),
        ({"certainty": np.zeros((60, 2))}, {}, ValueError, "certainty: expected"),
        ({"n": 0}, {}, ValueError, "holds no samples"),
        ({}, {"val_fraction": 0.6, "test_fraction": 0.5}, ValueError, "fractions"),
    ],
)
def test_bad_arrays_are_refused_at_construction(saved, changes, options, error, message):
    with pytest.raises(error, match=message):
        PrecomputedFeatures(saved(**changes), **options)


def test_real_concepts_are_not_bounded(saved):
    data = PrecomputedFeatures(saved(concepts=HIGH_CONCEPT), concepts={"names": ["a", "b", "c"], "kinds": "real"})
    assert data.concept_set.kinds == ("real",) * 3


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        PrecomputedFeatures(str(tmp_path / "none.npz"))
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not an archive at all")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            PrecomputedFeatures(str(tmp_path / name))
    np.savez(tmp_path / "b.npz", embedding=np.array([{"a": 1}], dtype=object), label=np.zeros(1, int))
    with pytest.raises(ValueError, match="allow_pickle"):
        PrecomputedFeatures(str(tmp_path / "b.npz"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"expected a \.npz or \.safetensors"):
        PrecomputedFeatures(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="path: expected a file, or files"):
        PrecomputedFeatures({"training": str(tmp_path / "a.npz")})


def probe(data):
    (x, y), (test_x, test_y) = (
        (data.splits[name].tensors["embedding"].float().numpy(), data.annotations(name)[1].numpy())
        for name in ("train", "test")
    )
    fitted = LogisticRegression(C=10, max_iter=2000).fit(x, y)
    return fitted.score(test_x, test_y), roc_auc_score(test_y, fitted.decision_function(test_x))


def test_skin_embeddings_carry_the_diagnosis(shared, tmp_path):
    data = PrecomputedFeatures(str(write_skin_embeddings(shared, tmp_path / "a.npz")))
    data.setup()
    assert {name: len(dataset) for name, dataset in data.splits.items()} == {"train": 288, "val": 58, "test": 161}
    assert (data.feature_dim, len(data.concept_set), data.class_names) == (768, 8, ["nevus", "melanoma"])
    accuracy, auc = probe(data)
    assert accuracy > 0.72
    assert auc > 0.8


def test_skin_texts_line_up_with_photographs(shared, tmp_path):
    path = write_skin_embeddings(shared, tmp_path / "a.npz", "ph2", concepts="described")
    data = PrecomputedFeatures(str(path))
    data.setup()
    concepts, labels = data.annotations("train")
    assert concepts.isnan().all()
    assert concepts.shape == (150, 10)
    blue = data.concept_set.embeddings[data.concept_set.index("blue")]
    brown = data.concept_set.embeddings[data.concept_set.index("brown")]
    # melanoma shows blue, nevi are brown: a zero-shot reading of two texts against the photographs
    score = data.splits["train"].tensors["embedding"].float() @ (blue - brown)
    assert roc_auc_score(labels.numpy(), score.numpy()) > 0.8


def test_padding_is_no_part_of_the_mean(tmp_path) -> None:
    import numpy as np

    from cbm_lightning.data import PrecomputedFeatures

    tokens = np.ones((20, 2, 3), np.float32)
    tokens[:, 1] = 9
    mask = np.tile([True, False], (20, 1))
    np.savez(tmp_path / "a.npz", tokens=tokens, token_mask=mask, label=np.arange(20) % 2, concepts=np.zeros((20, 1)))
    data = PrecomputedFeatures(str(tmp_path / "a.npz"))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert (batch["embedding"] == 1).all()
    assert batch["token_mask"].dtype == torch.bool
