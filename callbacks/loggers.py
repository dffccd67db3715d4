"""Tables and images to whatever loggers a Trainer has: wandb, TensorBoard, or files for the others."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from lightning.pytorch import Trainer
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FOLDER = "media"
"""Where files go under the folder of a logger that takes scalars only, or under the Trainer's ``default_root_dir``."""


def log_table(trainer: Trainer, name: str, table: pd.DataFrame) -> None:
    """Log a table under a name at the current step, on the first process only.

    A logger that takes tables (wandb) gets a table, one that takes text (TensorBoard) gets Markdown. For all others,
    and where there is no logger, it is written to ``media/NAME-step=STEP.csv``.

    Args:
        trainer: Its loggers are used.
        name: Name of the value, such as ``"val/prediction_table"``; slashes make folders of files.
        table: Of plain values.
    """
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger, experiment in _targets(trainer):
        if hasattr(logger, "log_table"):
            logger.log_table(name, columns=list(table.columns), data=table.to_numpy(object).tolist(), step=step)
        elif hasattr(experiment, "add_text"):
            experiment.add_text(name, _markdown(table), step)
        else:
            _write(_folder(trainer, logger), f"{name}-step={step}.csv", table.to_csv(index=False).encode())


def log_image(trainer: Trainer, name: str, image: Tensor) -> None:
    """Log an image under a name at the current step, on the first process only.

    Loggers that take images (wandb, TensorBoard) get it. For all others, and where there is no logger, it is written to
    ``media/NAME-step=STEP.png``.

    Args:
        trainer: Its loggers are used.
        name: Name of the value, such as ``"val/prediction_figure"``; slashes make folders of files.
        image: ``[1, H, W]`` or ``[3, H, W]``, uint8 or floats in [0, 1] (values outside are clipped).

    Raises:
        ValueError: The image has another shape.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: expected [1, H, W] or [3, H, W], got {list(image.shape)}")
    if not trainer.is_global_zero:
        return
    # bytes for every logger: wandb turns floats in [0, 1] black
    pixels = to_bytes(image).expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    step = trainer.global_step
    for logger, experiment in _targets(trainer):
        if hasattr(logger, "log_image"):
            logger.log_image(name, [pixels], step=step)
        elif hasattr(experiment, "add_image"):
            experiment.add_image(name, pixels, step, dataformats="HWC")
        else:
            from PIL import Image

            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="png")
            _write(_folder(trainer, logger), f"{name}-step={step}.png", file.getvalue())


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Log a matplotlib figure as an image, see `log_image`.

    Args:
        trainer: Its loggers are used.
        name: Name of the value.
        figure: Made without pyplot (``matplotlib.figure.Figure(...)``), which would keep it in memory for ever.
    """
    if trainer.is_global_zero:
        log_image(trainer, name, rasterize(figure))


def log_html(trainer: Trainer, name: str, page: str) -> None:
    """Log a page of HTML under a name at the current step, on the first process only.

    Wandb shows it; for all other loggers, and where there is none, it is written to ``media/NAME-step=STEP.html``.

    Args:
        trainer: Its loggers are used.
        name: Name of the value; slashes make folders of files.
        page: The whole page.
    """
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger, experiment in _targets(trainer):
        if hasattr(logger, "log_table") and hasattr(experiment, "log"):
            import wandb

            experiment.log({name: wandb.Html(page, inject=False), "trainer/global_step": step})
        else:
            _write(_folder(trainer, logger), f"{name}-step={step}.html", page.encode())


def rasterize(figure: Figure) -> Tensor:
    """The pixels ``[3, H, W]`` (uint8) of a matplotlib figure at its own size and resolution."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def to_bytes(image: Tensor) -> Tensor:
    """An image as uint8, floats read as [0, 1]."""
    return image if image.dtype == torch.uint8 else (image.detach().float().clamp(0, 1) * 255).round().byte()


def _targets(trainer: Trainer) -> list[tuple[Any, Any]]:
    """Each logger, of whatever class, with its experiment; a pair of None where there is no logger."""
    return [(logger, getattr(logger, "experiment", None)) for logger in trainer.loggers or (None,)]


def _folder(trainer: Trainer, logger: Any) -> str:
    # not trainer.log_dir, which waits for all processes while only the first one is here
    found = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir
    return str(found)


def _write(folder: str, name: str, content: bytes) -> None:
    """Write a file under ``folder/media``, local or remote, by a draft that takes its place when complete."""
    from fsspec.core import url_to_fs

    system, root = url_to_fs(folder)
    path = f"{root}/{FOLDER}/{name}"
    draft = f"{path}.{uuid4().hex}.draft"
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    try:
        system.pipe_file(draft, content)
        system.mv(draft, path)
    finally:
        if system.exists(draft):
            system.rm_file(draft)


def _markdown(table: pd.DataFrame) -> str:
    head = list(map(str, table.columns))
    rows = [[_cell(value) for value in row] for row in table.to_numpy(object).tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    # TensorBoard renders HTML as well as Markdown, in which <bias> would vanish
    return str(value).replace("<", "&lt;").replace("|", "&#124;")
