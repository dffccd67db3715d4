"""`ConceptOutput`: joined, changed and taken out of the graph without losing anything."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from cbm_lightning.types import ConceptOutput, Features


def full_output(n: int, dtype: torch.dtype = torch.float32, sample_dim: bool = False) -> ConceptOutput:
    """An output with every tensor field set."""

    def made(*shape: int) -> Tensor:
        return torch.randn(n, *shape).to(dtype).requires_grad_()

    values = torch.randn(2, n, 3).to(dtype).requires_grad_() if sample_dim else made(3)
    features = Features(made(5), made(4, 6), torch.rand(n, 4) < 0.5, (2, 2))
    return ConceptOutput(
        features,
        made(3),
        made(3),
        values,
        sample_dim=sample_dim,
        maps=made(3, 2, 2),
        uncertainty=made(3),
        label_logits=made(2),
        extras={"pairs": made(3, 2), "count": torch.arange(n)},
    )


def tensors(output: ConceptOutput) -> dict[str, Tensor]:
    own = {f.name: getattr(output, f.name) for f in fields(ConceptOutput) if f.name != "features"}
    everything = {**{f.name: getattr(output.features, f.name) for f in fields(Features)}, **own, **output.extras}
    return {name: value for name, value in everything.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("sample_dim", [False, True])
def test_joining_keeps_every_row_of_every_tensor(sample_dim: bool) -> None:
    first, second = full_output(4, sample_dim=sample_dim), full_output(3, sample_dim=sample_dim)
    assert first.can_join
    joined = ConceptOutput.cat([first, second])
    assert joined.features.grid == (2, 2)
    assert joined.sample_dim == sample_dim
    names = {"pooled", "tokens", "mask", "logits", "probs", "values", "maps", "uncertainty", "label_logits", "pairs"}
    assert set(tensors(joined)) == names | {"count"}
    for name, value in tensors(joined).items():
        dim = int(sample_dim and name == "values")
        assert torch.equal(value, torch.cat([tensors(first)[name], tensors(second)[name]], dim))


def test_joining_one_and_joining_what_is_absent() -> None:
    plain = ConceptOutput(Features(torch.randn(4, 5)), *torch.randn(3, 4, 3))
    assert ConceptOutput.cat([plain]) is plain
    joined = ConceptOutput.cat([plain, plain])
    assert len(joined.logits) == 8
    assert (joined.maps, joined.uncertainty, joined.label_logits, joined.features.tokens) == (None,) * 4
    assert joined.extras == {}


def test_what_cannot_be_joined() -> None:
    output = full_output(4)
    assert not output.replace(distribution=torch.distributions.Normal(output.logits, 1.0)).can_join
    assert not output.replace(extras={"note": "text"}).can_join
    assert not output.replace(extras={"scalar": torch.tensor(1.0)}).can_join
    assert not output.replace(extras={"other rows": torch.zeros(3)}).can_join


def test_a_change_reaches_every_tensor_and_leaves_the_original() -> None:
    output = full_output(4)
    output = output.replace(extras={**output.extras, "note": "text"})
    changed = output.map(lambda x: x[1:])
    assert set(tensors(changed)) == set(tensors(output))
    for name, value in tensors(changed).items():
        assert torch.equal(value, tensors(output)[name][1:])
        assert len(tensors(output)[name]) == 4
    assert changed.extras["note"] == "text"
    assert (changed.features.grid, changed.sample_dim, changed.time_dim) == ((2, 2), False, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_single_precision_out_of_the_graph(dtype: torch.dtype) -> None:
    output = full_output(4, dtype)
    for name, value in tensors(output.float()).items():
        before = tensors(output)[name]
        assert not value.requires_grad
        if not before.is_floating_point():
            assert value.dtype == before.dtype
        else:
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(value, before.to(value.dtype))
    assert output.values.requires_grad
