"""Masks beside the weights: in the checkpoint, in copies, and between the weights and their gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from cbm_lightning.sparsity.masks import SUFFIX, attach_mask, mask_of, restore_masks

NAME = "0.weight"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def pruned(model: nn.Sequential, every: int = 2) -> Tensor:
    """Mask every second weight of the first layer; the mask."""
    attach_mask(model, NAME)
    mask = mask_of(model, NAME)
    mask.view(-1)[::every] = 0.0
    with torch.no_grad():
        model[0].weight.mul_(mask)
    return mask


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def test_a_mask_is_a_buffer_of_ones_beside_its_parameter() -> None:
    model = network()
    expected = model(torch.ones(1, 4))
    attach_mask(model, NAME)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.weight_mask", "2.weight", "2.bias"]
    assert torch.equal(mask_of(model, NAME), torch.ones(3, 4))
    assert mask_of(model, NAME) is model[0].weight_mask
    assert torch.equal(model(torch.ones(1, 4)), expected)
    with pytest.raises(AttributeError):
        mask_of(model, "2.weight")


def test_masked_weights_get_no_gradient_and_stay_zero() -> None:
    model = network()
    mask = pruned(model)
    model(torch.randn(8, 4)).square().mean().backward()
    assert model[0].weight.grad is not None
    assert torch.equal(model[0].weight.grad != 0, (mask != 0) & (model[0].weight.grad != 0))
    assert int((model[0].weight.grad != 0).sum()) > 0
    before = model[0].weight.clone()
    train(model)
    assert torch.equal(model[0].weight == 0, mask == 0)
    assert not torch.equal(model[0].weight, before)


def test_a_mask_that_shrinks_acts_at_once() -> None:
    model = network()
    mask = pruned(model)
    mask.zero_()
    model(torch.randn(8, 4)).square().mean().backward()
    assert int(model[0].weight.grad.count_nonzero()) == 0


def test_attaching_twice_keeps_the_mask() -> None:
    model = network()
    mask = pruned(model)
    attach_mask(model, NAME)
    assert mask_of(model, NAME) is mask
    model(torch.randn(8, 4)).square().mean().backward()
    assert len(model[0].weight._backward_hooks) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "saved"])
def test_masks_travel_with_the_module(how: str) -> None:
    model = network()
    mask = pruned(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, stream := io.BytesIO())
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert torch.equal(mask_of(other, NAME), mask)
    mask_of(other, NAME).zero_()
    assert int(mask.count_nonzero()) == 6  # the copy has a mask of its own


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_that_gets_its_mask_attached_again_keeps_its_zeros(how: str) -> None:
    model = network()
    mask = pruned(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    attach_mask(other, NAME)
    train(other)
    assert torch.equal(other[0].weight == 0, mask == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_follow_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    model = network()
    pruned(model)
    model.to(dtype)
    assert mask_of(model, NAME).dtype == dtype
    model(torch.randn(8, 4, dtype=dtype)).square().mean().backward()
    assert model[0].weight.grad.dtype == dtype
    assert int((model[0].weight.grad[mask_of(model, NAME) == 0]).count_nonzero()) == 0


def test_a_frozen_parameter_can_be_masked() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    mask = pruned(model)
    assert int(mask.count_nonzero()) == 6
    # and its gradients are masked once it trains
    model[0].weight.requires_grad_(True)
    train(model)
    assert torch.equal(model[0].weight == 0, mask == 0)


def test_weights_with_masks_load_into_a_module_without() -> None:
    model, fresh = network(), network()
    mask = pruned(model)
    state = model.state_dict()
    restore_masks(fresh, state)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(mask_of(fresh, NAME), mask)
    train(fresh)
    assert torch.equal(fresh[0].weight == 0, mask == 0)


def test_weights_without_masks_load_into_a_module_that_has_them() -> None:
    model, plain = network(), network()
    pruned(model)
    state = plain.state_dict()
    restore_masks(model, state)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(mask_of(model, NAME), torch.ones(3, 4))


def test_weights_of_something_else_are_left_alone() -> None:
    model = network()
    pruned(model)
    state = {"2.weight": torch.zeros(2, 3)}
    restore_masks(model, state)
    assert list(state) == ["2.weight"]
    plain = network()
    buffer = {f"9.other{SUFFIX}": torch.ones(2), "0.weight": torch.ones(3, 4)}
    restore_masks(plain, buffer)
    assert not list(plain.buffers())
