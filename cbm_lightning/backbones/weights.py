"""Reading local weight files, and saying in a line why they do not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or a torch file, unwrapped from training checkpoints.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read: truncated, of another format, or holding pickled code.
    """
    from timm.models import load_state_dict

    file = existing_file(path)
    try:
        weights = load_state_dict(str(file), weights_only=True)
        tensors = all(isinstance(weight, Tensor) for weight in weights.values())
    # each reader and each kind of damage raises another class of exception
    except Exception as error:
        raise unreadable(file, error) from error
    if not tensors:
        raise ValueError(f"checkpoint_path: {file} holds no state dict of tensors under 'state_dict', 'model' or alone")
    return dict(weights)


def existing_file(path: str | Path) -> Path:
    """The path of a weight file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint_path: no file at {file}")
    return file


def unreadable(file: Path, error: Exception) -> ValueError:
    """What to raise for a weight file that cannot be read."""
    reason = str(error).strip().partition("\n")[0][:200]
    return ValueError(
        f"checkpoint_path: {file} cannot be read as safetensors or as a torch file of tensors only; it may be "
        f"truncated: copy or download it again ({type(error).__name__}: {reason})"
    )


def load_timm_weights(model: Any, path: str | Path) -> None:
    """Load a local file into a timm model without a classifier.

    The classifier of the file is dropped. A file in another layout than the model's (weights of the original authors,
    position embeddings of another size) goes through the conversion that timm keeps for the model family.

    Args:
        model: A timm model made with ``num_classes=0``.
        path: A ``.safetensors`` file or a torch file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read or does not fit the model.
    """
    weights = read_weights(path)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    candidate = _without(weights, classifiers)
    misfit = find_misfit(model, candidate)
    if misfit and convert is not None:
        try:
            converted = _without(convert(weights, model), classifiers)
        # a conversion met with foreign weights fails in its own way; the misfit says more
        except Exception:
            converted = candidate
        if not find_misfit(model, converted):
            candidate, misfit = converted, None
    if misfit:
        raise ValueError(
            f"checkpoint_path: {path} does not fit {model.pretrained_cfg.get('architecture', type(model).__name__)}: "
            f"{misfit}; check the name and model_args"
        )
    model.load_state_dict(candidate)


def find_misfit(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """What is missing, unexpected or of another shape in the weights of a model, None if they fit."""
    own = model.state_dict()
    # torch fills in this counter where old files lack it
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
        for key in weights
        if key in own and weights[key].shape != own[key].shape
    ]
    return describe_misfit(missing, unexpected, shapes)


def describe_misfit(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str] = ()) -> str | None:
    """The first few keys of each kind and how many there are, None if there are none."""
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "of another shape": list(shapes)}
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    return "; ".join(found) or None


def _without(weights: dict[str, Tensor], modules: tuple[str, ...]) -> dict[str, Tensor]:
    prefixes = tuple(f"{module}." for module in modules)
    return {key: weight for key, weight in weights.items() if not key.startswith(prefixes)}
