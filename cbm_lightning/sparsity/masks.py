"""Masks of pruned weights: buffers beside the parameters, so that zeros outlive the run that made them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SUFFIX = "_mask"

# parameters whose gradients are masked; a copy of one has its buffer, but no hook
_hooked: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


def attach_mask(module: nn.Module, name: str) -> None:
    """Register a mask of ones for a parameter, unless it has one, and keep gradients from what is masked.

    The mask is the buffer ``NAME_mask`` of the submodule that owns the parameter, of numbers 0 and 1 (what averages
    weights blends buffers, which bools do not survive). It is saved with the weights.

    Args:
        module: Has the parameter.
        name: As in ``module.named_parameters()``.
    """
    owner, _, own_name = name.rpartition(".")
    part = module.get_submodule(owner)
    parameter: nn.Parameter = getattr(part, own_name)
    if own_name + SUFFIX not in dict(part.named_buffers(recurse=False)):
        part.register_buffer(own_name + SUFFIX, torch.ones_like(parameter))
    if parameter in _hooked:
        return

    def keep_zero(gradient: Tensor) -> Tensor:
        return gradient * mask_of(module, name).to(gradient)

    trains = parameter.requires_grad
    # where a module is sent to another process, the mask goes along and the hook, without a warning, does not
    parameter.requires_grad_(True).register_hook(torch.utils.hooks.unserializable_hook(keep_zero))
    parameter.requires_grad_(trains)
    _hooked[parameter] = True


def mask_of(module: nn.Module, name: str) -> Tensor:
    """The mask of a parameter, of its shape."""
    return module.get_buffer(name + SUFFIX)


def apply_masks(module: nn.Module, names: Iterable[str]) -> None:
    """Make zero what is masked, wherever momentum or averages have moved it."""
    with torch.no_grad():
        for name in names:
            module.get_parameter(name).masked_fill_(mask_of(module, name) == 0, 0.0)


def renew_masks(module: nn.Module, names: Iterable[str]) -> None:
    """Mask what is zero now, and nothing else: for weights that were fitted anew."""
    for name in names:
        mask_of(module, name).copy_(module.get_parameter(name) != 0)


def masked(module: nn.Module) -> list[str]:
    """The names of the parameters that have a mask."""
    buffers = dict(module.named_buffers())
    return [name for name, _ in module.named_parameters() if name + SUFFIX in buffers]


def restore_masks(module: nn.Module, state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Make a module and the weights that it is to load agree on which parameters are masked.

    `CBMModule` does so when it loads a checkpoint. A LightningModule of your own that `SparsitySchedule` prunes calls
    it in ``on_load_checkpoint`` with ``checkpoint["state_dict"]``.

    Args:
        module: Gets the masks that the weights bring.
        state: The weights; gets masks of ones that the module has and the weights do not bring.
        prefix: Of the module's names among the weights.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if prefix + name + SUFFIX in state:
            attach_mask(module, name)
        elif name + SUFFIX in dict(module.named_buffers()) and prefix + name in state:
            state[prefix + name + SUFFIX] = torch.ones_like(parameter)
