from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.losses import ConceptLoss, label_loss

CONCEPTS = ConceptSet(["a", "b", "c"])
NAN = float("nan")


def build(concepts: ConceptSet = CONCEPTS, **options) -> ConceptLoss:
    loss = ConceptLoss(**options)
    loss.build(concepts)
    return loss


def test_mean_and_sum_differ_by_the_number_of_concepts() -> None:
    logits, concepts = torch.randn(8, 3), torch.rand(8, 3)
    expected = binary_cross_entropy_with_logits(logits, concepts)
    torch.testing.assert_close(build()(logits, concepts), expected)
    torch.testing.assert_close(build(reduction="sum")(logits, concepts), 3 * expected)


def test_unknown_annotations_change_nothing_and_get_no_gradient() -> None:
    logits = torch.randn(8, 3, requires_grad=True)
    concepts = torch.rand(8, 3)
    concepts[2:5, 1] = NAN
    concepts[:, 2] = NAN
    known = ~concepts.isnan()
    for reduction in ("mean", "sum"):
        loss = build(reduction=reduction)(logits, concepts)
        gradient = torch.autograd.grad(loss, logits)[0]
        assert gradient[~known].abs().sum() == 0
        assert gradient[known].abs().min() > 0
    torch.testing.assert_close(
        build()(logits, concepts), binary_cross_entropy_with_logits(logits[known], concepts[known])
    )
    assert build()(logits, torch.full((8, 3), NAN)) == 0


def test_weight_scales_both_terms_and_pos_weight_the_positive_one() -> None:
    logits, concepts = torch.randn(8, 3), (torch.rand(8, 3) > 0.5).float()
    numbers = torch.tensor([1.0, 2.0, 5.0])
    each = binary_cross_entropy_with_logits(logits, concepts, reduction="none")
    torch.testing.assert_close(build(weight=[1, 2, 5])(logits, concepts), (each * numbers).mean())
    torch.testing.assert_close(
        build(pos_weight=[1, 2, 5])(logits, concepts), (each * torch.where(concepts > 0, numbers, 1.0)).mean()
    )


def test_balanced_weights_survive_concepts_that_never_vary() -> None:
    concepts = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, NAN, 1.0], [0.0, 0.0, NAN]])
    loss = build(weight="balanced", pos_weight="balanced")
    assert loss.needs_annotations
    loss.fit(concepts)
    assert loss.weight.tolist() == [3.0, 1.0, 1.0]
    assert loss.pos_weight.tolist() == [3.0, 1.0, 1.0]
    assert not build(weight=[1, 1, 1]).needs_annotations


def test_categorical_groups_use_their_softmax_and_real_concepts_the_squared_error() -> None:
    concepts = ConceptSet(["x", "y", "size"], {"g": ["x", "y"]}, ["categorical", "categorical", "real"])
    logits, size = torch.randn(6, 3), torch.randn(6)
    member = torch.randint(0, 2, (6,))
    target = torch.cat([torch.nn.functional.one_hot(member, 2).float(), size[:, None]], 1)
    expected = (cross_entropy(logits[:, :2], member, reduction="sum") + (logits[:, 2] - size).square().sum()) / 18
    torch.testing.assert_close(build(concepts)(logits, target), expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reduction": "max"}, "reduction"),
        ({"weight": [1.0]}, "weight"),
        ({"pos_weight": "even"}, "pos_weight"),
        ({"weight": [1, -1, 1]}, "weight"),
    ],
)
def test_bad_options_name_the_field(options, field) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        build(**options)


def test_label_losses() -> None:
    logits, label = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(
        label_loss(logits, label, "multiclass", 0.1), cross_entropy(logits, label, label_smoothing=0.1)
    )
    yes = torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(
        label_loss(logits[:, :1], yes, "binary", 0.2), binary_cross_entropy_with_logits(logits[:, 0], yes * 0.8 + 0.1)
    )
    several = (torch.rand(5, 4) > 0.5).long()
    torch.testing.assert_close(
        label_loss(logits, several, "multilabel"), binary_cross_entropy_with_logits(logits, several.float())
    )


def test_labels_of_any_integer_type() -> None:
    logits, label = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(
            label_loss(logits, label.to(dtype), "multiclass"), label_loss(logits, label, "multiclass")
        )
