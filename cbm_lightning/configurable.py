"""Parts that know how they were made, so that a checkpoint can make them again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn


class Configurable:
    """Records the arguments of its construction as plain data, nested parts included.

    A subclass calls nothing: the arguments are bound to the signature of its own ``__init__`` when it is made, under
    plain Python and under the LightningCLI alike.

    Example:
        >>> class Scale(Configurable):
        ...     def __init__(self, factor: float = 2.0) -> None:
        ...         self.factor = factor
        >>> Scale(3.0).spec()["init_args"]
        {'factor': 3.0}
    """

    _init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the signature of ``__init__`` to `inspect` and editors, which ``__new__`` would hide."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=list(signature.parameters.values())[1:], return_annotation=inspect.Signature.empty
        )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Bind the arguments before ``__init__`` runs; copy and unpickle restore them with the rest of the state."""
        made = super().__new__(cls)
        signature = inspect.signature(cls)
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}; it takes {signature}") from None
        bound.apply_defaults()
        init_args = dict(bound.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                init_args.update(init_args.pop(parameter.name, {}))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and not init_args.get(parameter.name):
                # of a part without an __init__ of its own
                init_args.pop(parameter.name, None)
        object.__setattr__(made, "_init_args", init_args)
        return made

    def spec(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": ...}`` with plain values only.

        Raises:
            TypeError: An argument has no plain form (a bare ``nn.Module``, a function).
        """
        return {"class_path": class_path(type(self)), "init_args": plain(self.portable_init_args())}

    def portable_init_args(self) -> dict[str, Any]:
        """The arguments that make the same structure on a machine without the training files.

        Override to drop sources of weights or statistics, which a checkpoint brings along in its state dict.
        """
        return dict(self._init_args)


def class_path(cls: type) -> str:
    """Import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(value: Any) -> Any:
    """Turn a value into strings, numbers, lists and dicts, recording nested parts by their spec.

    Raises:
        TypeError: The value has no plain form.
    """
    if isinstance(value, Configurable):
        return value.spec()
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return value.to_dict()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written into a checkpoint as plain data: {value!r}")


def is_spec(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is ``{"class_path": ..., "init_args": ...}``."""
    return isinstance(value, dict) and "class_path" in value and set(value) <= {"class_path", "init_args"}


def build(value: Any) -> Any:
    """Make the objects that a `plain` value describes: the inverse of `plain` for parts and their containers.

    Only subclasses of `Configurable` are made, so that a checkpoint cannot name arbitrary code.

    Raises:
        ValueError: A class path leads nowhere, or to a class that is not a `Configurable`.
    """
    if is_spec(value):
        cls = import_class(value["class_path"])
        if not issubclass(cls, Configurable):
            raise ValueError(f"class_path {value['class_path']!r} is not a part of cbm_lightning or derived from one")
        return cls(**build(value.get("init_args") or {}))
    if isinstance(value, dict):
        return {key: build(item) for key, item in value.items()}
    if isinstance(value, list):
        return [build(item) for item in value]
    return value


def import_class(path: str) -> type:
    """Find a recorded class: one of this package, or one of the user's that is imported already.

    Raises:
        ValueError: There is no such class, or its module was not imported. A checkpoint never makes us import foreign
            code.
    """
    module_name, _, name = path.rpartition(".")
    if module_name.partition(".")[0] == __package__:
        importlib.import_module(module_name)
    found = getattr(sys.modules.get(module_name), name, None)
    if not isinstance(found, type):
        raise ValueError(f"no class {path!r} is known here; import the module that defines it, then load again")
    return found


class Part(Configurable, nn.Module):
    """Base of every backbone, bottleneck, head and loss: an ``nn.Module`` that records how it was made."""
