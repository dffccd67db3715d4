"""Identity: widths from the user or from the data, and features of the wrong shape."""

from __future__ import annotations

import pytest
import torch

from cbm_lightning.backbones.identity import Identity
from cbm_lightning.configurable import build


def test_vectors_pass_through() -> None:
    x = torch.rand(3, 5)
    features = Identity(5)(x)
    assert features.pooled is x
    assert features.tokens is None


def test_tokens_are_averaged() -> None:
    x = torch.rand(3, 7, 5)
    backbone = Identity(5, tokens=True)
    assert backbone.dims == (5, 5, None)
    features = backbone(x)
    assert features.tokens is x
    torch.testing.assert_close(features.pooled, x.mean(1))


def test_width_from_the_data_is_recorded() -> None:
    backbone = Identity()
    backbone.build(12)
    assert backbone.dims == (12, None, None)
    restored = build(backbone.spec())
    assert restored.dims == (12, None, None)
    restored.build(None)


def test_widths_that_are_unknown_or_differ() -> None:
    with pytest.raises(ValueError, match="width of the features is unknown"):
        Identity().build(None)
    with pytest.raises(ValueError, match=r"width 5, the data has 6"):
        Identity(5).build(6)
    with pytest.raises(ValueError, match="positive"):
        Identity(0)


@pytest.mark.parametrize(("tokens", "shape"), [(False, (2, 6)), (False, (2, 3, 5)), (True, (2, 5)), (True, (2, 3, 4))])
def test_other_shapes_are_refused(tokens: bool, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features: expected"):
        Identity(5, tokens=tokens)(torch.rand(shape))
