"""Lays the MONET embeddings of dermatology photographs out as a file for `PrecomputedFeatures`.

The reference folder holds features of Derm7pt (train and validation photographs) and PH2 (all three splits) with eight
clinical concepts a photograph, and text vectors of ten other, described concepts (colours, asymmetry, ...). So a file
has either annotated concepts or text vectors, never both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cbm_lightning.data.images import stratified_split

DESCRIBED = "monet/concept_embeddings_"


def write_skin_embeddings(
    shared: Path,
    path: Path,
    dataset: Literal["derm7pt", "ph2"] = "derm7pt",
    concepts: Literal["clinical", "described"] = "clinical",
) -> Path:
    """Write ``path`` (.npz) and return it.

    There are no features of the test photographs of Derm7pt, so its validation photographs are the test split and a
    stratified sixth of the training photographs is the validation split.
    """
    source = shared / "data" / "skin_clip"
    features = np.load(source / "skin_features.npz", allow_pickle=False)
    meta = json.loads((source / "meta.json").read_text())
    label = features[f"{dataset}_label"].astype(np.int64)
    arrays: dict[str, Any] = {
        "embedding": features[f"{dataset}_monet_ViT-L-14"],
        "label": label,
        "split": features[f"{dataset}_split"],
        "class_names": np.array(meta["classes"]),
    }
    if dataset == "derm7pt":
        official = torch.from_numpy(arrays["split"].astype(np.int64))
        train = (official == 0).nonzero()[:, 0]
        official[official == 1] = 2
        official[train[stratified_split(torch.from_numpy(label)[train], {"val": 1 / 6}, seed=0)["val"]]] = 1
        arrays["split"] = official.numpy()
    if concepts == "clinical":
        arrays["concepts"] = features[f"{dataset}_concept"].astype(np.float32)
        arrays["concept_names"] = np.array(meta["concepts"])
    else:
        texts = np.load(source / "skin_text_embeddings.npz", allow_pickle=False)
        names = sorted(name for name in texts.files if name.startswith(DESCRIBED))
        arrays["text_embeddings"] = np.concatenate([texts[name] for name in names])
        arrays["concept_names"] = np.array([name.removeprefix(DESCRIBED).lower() for name in names])
    np.savez(path, **arrays)
    return path
