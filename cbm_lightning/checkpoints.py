"""Checkpoints that restore a model from the file alone, on another machine, without pickle."""

from __future__ import annotations

import inspect
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Self

import fsspec
import torch
from lightning.pytorch import LightningModule
from torch import nn

from cbm_lightning.configurable import Configurable, build, class_path, import_class, plain
from cbm_lightning.data_facts import DataFacts
from cbm_lightning.randomness import all_rng_states, restore_rng_state
from cbm_lightning.sparsity.masks import restore_masks

# what the CLI and Lightning add beside the arguments
CLASS_KEY = "_class_path"


class PortableModule(Configurable, LightningModule):
    """A LightningModule whose hyper-parameters are plain data and whose checkpoints need nothing else.

    Parts are stored by class and arguments, without the sources of their weights (the state dict holds the weights),
    so that a restore downloads nothing. Arguments without a plain form, such as a bare ``nn.Module`` as backbone, must
    be handed to `load_from_checkpoint` again.

    Attributes:
        plain_arguments: Arguments that take ``{"class_path": ...}`` as it is, so that a restore must not build it.
    """

    plain_arguments: tuple[str, ...] = ("optimizer", "lr_scheduler", "phases")

    def record_hparams(self, facts: DataFacts) -> None:
        """Store the arguments of construction as plain hyper-parameters; called at the end of ``__init__``."""
        given = dict(self._init_args)
        # with the datamodule would go its samples and its Trainer, wherever the model is copied or sent
        from_data = self._init_args.pop("data", None) is not None
        made = {name: getattr(self, name) for name in ("backbone", "bottleneck", "head", "concept_loss")}
        told = {"concepts": facts.concepts, "num_classes": facts.num_classes, "class_names": facts.class_names}
        # a subclass may take other arguments and make parts itself: only what it takes can be handed to it again
        known = given | {name: value for name, value in {**made, **told, "data": None}.items() if name in given}
        hparams: dict[str, Any] = {CLASS_KEY: class_path(type(self))}
        self._unrecorded: list[str] = []
        if from_data and self._takes_keywords():
            known |= told
        elif from_data and not told.keys() <= known.keys():
            self._unrecorded.append("data")
        for name, value in known.items():
            try:
                hparams[name] = plain(value)
            except TypeError:
                self._unrecorded.append(name)
        self._weights_source = plain_source(made["backbone"])
        self._resumed_rng: list[dict[str, Any]] | None = None
        self.save_hyperparameters(hparams)
        self.register_load_state_dict_pre_hook(_make_room_for_masks)  # type: ignore[no-untyped-call]

    @classmethod
    def _takes_keywords(cls) -> bool:
        parameters = inspect.signature(cls).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the hyper-parameters leave out: random states, arguments to hand over, where weights came from."""
        checkpoint["cbm_lightning"] = {
            "rng": all_rng_states(),
            "unrecorded": self._unrecorded,
            "weights_source": self._weights_source,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of a run that is resumed; `restore_randomness` sets them when training begins."""
        resumes = self._trainer is not None and self._trainer.state.fn == "fit"
        self._resumed_rng = checkpoint.get("cbm_lightning", {}).get("rng") if resumes else None

    def restore_randomness(self) -> bool:
        """Set the random states of the checkpoint that is resumed, once; whether there were any."""
        states, self._resumed_rng = self._resumed_rng, None
        if states:
            restore_rng_state(states[self.global_rank % len(states)])
        return bool(states)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = "cpu",
        hparams_file: None = None,
        strict: bool = True,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Restore a model from a checkpoint alone.

        Args:
            checkpoint_path: A path, URL or open file.
            map_location: Where the weights go.
            hparams_file: Not supported, the checkpoint holds the hyper-parameters.
            strict: Whether the weights must match exactly.
            weights_only: Must be True, nothing is unpickled.
            kwargs: Arguments of construction that replace the stored ones, or were not stored.

        Raises:
            ValueError: The file is damaged, is no checkpoint of this package, holds an unrelated class, or needs an
                argument that was not stored.
        """
        if hparams_file is not None or not weights_only:
            raise ValueError("checkpoints bring their hyper-parameters and load with weights_only=True, nothing else")
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        hparams = dict(checkpoint.get("hyper_parameters") or {})
        if CLASS_KEY not in hparams:
            raise ValueError(
                f"{checkpoint_path} is a checkpoint, but not one of cbm_lightning: it names no {CLASS_KEY}"
            )
        target = cls._target_class(hparams.pop(CLASS_KEY))
        unrecorded = checkpoint.get("cbm_lightning", {}).get("unrecorded", [])
        if missing := [name for name in unrecorded if name not in kwargs]:
            raise ValueError(
                f"{missing} had no plain form when the checkpoint was written (a bare nn.Module, say): hand them over "
                f"again, {target.__name__}.load_from_checkpoint(path, {missing[0]}=...)"
            )
        arguments = {
            name: value if name in cls.plain_arguments else build(value)
            for name, value in hparams.items()
            if name not in kwargs and not name.startswith("_")
        }
        model = target(**{**arguments, **kwargs})
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=strict)
        return model.to(map_location) if isinstance(map_location, (str, torch.device)) else model

    @classmethod
    def _target_class(cls, path: str) -> type[Self]:
        if path == class_path(cls):
            return cls
        target = import_class(path)
        if issubclass(target, cls):
            return target
        if issubclass(cls, target):
            return cls
        raise ValueError(f"the checkpoint holds a {path}, which is no {cls.__name__}; load it with that class")


def _make_room_for_masks(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: some may bring masks, as pruned models do."""
    restore_masks(module, state, prefix)


def plain_source(part: Configurable) -> dict[str, Any] | None:
    """Where a part's weights came from, as plain data, or None if that cannot be written down."""
    try:
        return {"class_path": class_path(type(part)), "init_args": plain(part._init_args)}
    except TypeError:
        return None


def read_checkpoint(path: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint without unpickling code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, or holds something else than plain containers and tensors.
    """
    try:
        if isinstance(path, (str, Path)):
            with fsspec.open(str(path), "rb") as file:
                content = torch.load(file, map_location=map_location, weights_only=True)
        else:
            content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is truncated or not a checkpoint of plain data: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint: it has no state_dict")
    return content
