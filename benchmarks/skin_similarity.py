"""The recipe `clip_similarity` on real MONET embeddings of dermatology photographs, melanoma against nevus.

    python benchmarks/skin_similarity.py --shared ../shared

The label rests on the similarity with ten described concepts alone (colours, asymmetry, ...), beside a linear probe on
the whole embedding. No concept labels are used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cbm_lightning.cli import main
from cbm_lightning.data import PrecomputedFeatures

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from skin_embeddings import write_skin_embeddings

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


def probe(path: Path) -> float:
    """Test accuracy of a logistic regression on the embeddings."""
    data = PrecomputedFeatures(str(path))
    data.setup()
    train, test = (data.splits[split].tensors for split in ("train", "test"))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=5000))
    return float(model.fit(train["embedding"], train["label"]).score(test["embedding"], test["label"]))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/skin_clip")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for dataset in ("ph2", "derm7pt"):
            path = write_skin_embeddings(options.shared, Path(folder) / f"{dataset}.npz", dataset, "described")
            accuracies = []
            for seed in range(options.seeds):
                arguments = ["fit", "--config", "clip_similarity", f"--data.path={path}", f"--seed_everything={seed}"]
                cli = main([*arguments, *QUIET, f"--trainer.logger.save_dir={folder}"])
                accuracies.append(float(cli.trainer.callback_metrics["test/label_acc"]))
            mean, spread = torch.tensor(accuracies).mean(), torch.tensor(accuracies).std(correction=0)
            lines.append(f"| {dataset} | {mean:.3f} ± {spread:.3f} | {probe(path):.3f} |")
    print(f"\n| photographs | `clip_similarity`, {options.seeds} seeds | linear probe |\n| --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    run()
