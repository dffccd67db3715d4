"""Every bottleneck on two processes: ``python contract_ddp.py FOLDER`` writes what `test_contract_ddp` compares."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from bottlenecks.contract import CASES, make
from lightning.pytorch import Callback
from toy import quiet_trainer
from toy_images import ToyImages


class Rank(Callback):
    """Keeps the weights of each process at the end of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, model) -> None:
        # what callbacks and hooks of one process know differs; what was trained must not
        torch.save(dict(model.named_parameters()), self.folder / f"rank {trainer.global_rank}.pt")


def run(name: str, folder: Path) -> dict[str, str | dict[str, float]]:
    """Fit on two processes, then score the same weights on one and on two."""
    folder.mkdir(parents=True)
    data = ToyImages(n=16, n_eval=9, batch_size=4)
    model = make(name, lr=0.01)
    try:
        quiet_trainer(devices=2, strategy="ddp_fork", callbacks=[Rank(folder)]).fit(model, data)
        model = make(name)
        one = quiet_trainer().test(model, data, verbose=False)[0]
        two = quiet_trainer(devices=2, strategy="ddp_fork").test(model, data, verbose=False)[0]
    except Exception:
        return {"error": traceback.format_exc()[-1500:]}
    return {"one": one, "two": two}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    (place / "scores.json").write_text(json.dumps({name: run(name, place / name) for name in CASES}))
