"""What benchmarks share: models trained by recipe and command line, and tables of means with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cbm_lightning import CBMModule
from cbm_lightning.cli import main

KEEP_LAST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"save_last": True, "monitor": None},
}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "callbacks": [KEEP_LAST]}


def trained(recipe: str, name: str, seed: int, folder: Path, overrides: dict[str, Any] | None = None) -> CBMModule:
    """The last weights of a run of a recipe, or those that an earlier call left in the folder.

    Args:
        recipe: Name of a recipe.
        name: What to call the run; another name for other overrides.
        seed: Of weights, draws and, if the datamodule has a seed, of the data.
        folder: Runs are kept in ``folder/name-seed``.
        overrides: What differs from the recipe, laid out like it: ``{"model": {"init_args": {...}}, "data": ...}``.
    """
    home = folder / f"{name}-{seed}"
    finished = home / "finished.ckpt"
    if not finished.exists():
        home.mkdir(parents=True, exist_ok=True)
        given = dict(overrides or {})
        given["trainer"] = {**QUIET, **given.get("trainer", {})}
        config = home / "overrides.yaml"
        config.write_text(yaml.safe_dump(given))
        arguments = ["fit", "--config", recipe, "--config", str(config), "--seed_everything", str(seed)]
        cli = main([*arguments, "--data.seed", str(seed), "--trainer.logger.save_dir", str(home)])
        Path(cli.trainer.checkpoint_callback.last_model_path).replace(finished)
    return CBMModule.load_from_checkpoint(str(finished)).eval()


def spread(table: pd.DataFrame, by: Sequence[str], digits: int = 3) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every other column, as ``.123 (.004)``, a row a value of ``by``."""

    def tell(values: pd.Series) -> str:
        mean, deviation = values.mean(), values.std()
        # of one seed there is no deviation
        return f"{mean:.{digits}f}" + ("" if pd.isna(deviation) else f" ({deviation:.{digits}f})")

    return table.drop(columns="seed").groupby(list(by), sort=False).agg(tell)
