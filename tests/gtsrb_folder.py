"""Lays real traffic signs out as a user's folder: ``python tests/gtsrb_folder.py DEST`` (needs ``CBM_SHARED``).

``DEST/signs.csv`` has a row a photograph: ``image``, ``label`` (name of the sign), ``split``, ``track`` and the 49
concepts of its class; ``DEST/concepts.json`` has their groups; ``DEST/classes.csv`` is the class-by-concept table. A
track is one physical sign, photographed eight times while a car approaches: whole tracks go to a split, never frames.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_gtsrb_folder(dest: Path, gtsrb32: Path, frames_a_track: int = 8) -> Path:
    """Write the folder from the reference data in ``gtsrb32`` and return it; a second or two.

    Args:
        dest: Folder to fill.
        gtsrb32: The reference data.
        frames_a_track: Keep this many photographs of each sign, the nearest ones, for a smaller folder.
    """
    from PIL import Image

    meta, data = json.loads((gtsrb32 / "meta.json").read_text()), np.load(gtsrb32 / "train_tracks.npz")
    labels, tracks, pixels = data["label"].astype(int), data["track"].astype(int), data["image"]
    kept = np.flatnonzero(frames_to_the_end(labels, tracks) <= frames_a_track)
    splits = split_by_track(labels, tracks)
    concepts, table = meta["concepts"], meta["class_concept"]
    rows = []
    for i in kept:
        track = f"{labels[i]:02d}_{tracks[i]:03d}"
        image = f"images/{labels[i]:02d}/{track}_{data['frame'][i]:02d}.png"
        (dest / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(dest / image, compress_level=1)
        rows.append([image, meta["classes"][labels[i]], splits[i], track, *table[labels[i]]])
    write_csv(dest / "signs.csv", ["image", "label", "split", "track", *concepts], rows)
    class_rows = [[name, *values] for name, values in zip(meta["classes"], table, strict=True)]
    write_csv(dest / "classes.csv", ["label", *concepts], class_rows)
    groups: dict[str, list[str]] = {}
    for concept, group in zip(concepts, meta["group"], strict=True):
        groups.setdefault(group, []).append(concept)
    (dest / "concepts.json").write_text(json.dumps({"names": concepts, "groups": groups}, indent=1))
    return dest


def split_by_track(labels: NDArray[np.int64], tracks: NDArray[np.int64]) -> list[str]:
    """Of the signs of each class, in a seeded order, a fifth for test, a tenth for validation, at least one each."""
    rng = np.random.default_rng(0)
    split_of: dict[tuple[int, int], str] = {}
    for label in np.unique(labels):
        signs = rng.permutation(np.unique(tracks[labels == label]))
        n_test, n_val = max(1, round(len(signs) / 5)), max(1, round(len(signs) / 10))
        names = ["test"] * n_test + ["val"] * n_val + ["train"] * (len(signs) - n_test - n_val)
        split_of |= {(int(label), int(sign)): name for sign, name in zip(signs, names, strict=True)}
    return [split_of[int(label), int(track)] for label, track in zip(labels, tracks, strict=True)]


def frames_to_the_end(labels: NDArray[np.int64], tracks: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each photograph, in time order within its track, how many of the track are left, itself included."""
    _, track, count = np.unique(labels * 1000 + tracks, return_inverse=True, return_counts=True)
    order = np.argsort(track, kind="stable")
    position = np.empty(len(track), int)
    position[order] = np.arange(len(track)) - np.repeat(np.cumsum(count) - count, count)
    return count[track] - position


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/gtsrb_folder.py DEST")
    shared = Path(os.environ.get("CBM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    print(write_gtsrb_folder(Path(sys.argv[1]), shared / "data" / "gtsrb32"))
