"""Discovered concepts: attention and presence, losses over a batch, corrections, and whether anything is discovered."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from toy import quiet_trainer
from toy_images import SIZE, Rows, ToyConv, ToyImages, batch_of

from cbm_lightning import CBMModule
from cbm_lightning.bottlenecks import SlotBottleneck
from cbm_lightning.bottlenecks.botcl import compete, encode_places, tanh_logits
from cbm_lightning.bottlenecks.botcl_losses import (
    consistency_loss,
    distinctiveness_loss,
    retrieval_loss,
)
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.metrics import ConceptPurity
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention, LossContext

GRID, CELLS, TOKENS, CONCEPTS = (3, 4), 12, 6, 5
LOSSES = {"retrieval", "area", "quantization", "distinctiveness", "consistency"}
WEIGHTS = {"retrieval": 0.1, "area": 0.1, "quantization": 0.1, "distinctiveness": 0.05, "consistency": 0.01}


def built(concepts: int = CONCEPTS, **options: Any) -> SlotBottleneck:
    bottleneck = SlotBottleneck(**{"width": 8, **options})
    bottleneck.build(FeatureDims(7, TOKENS, GRID), ConceptSet.make(concepts), num_classes=3)
    with torch.no_grad():
        bottleneck.norm.running_mean.normal_()
        bottleneck.norm.running_var.uniform_(0.5, 2.0)
        bottleneck.norm.bias.normal_()
    return bottleneck.eval()


def features(n: int = 4, mask: Tensor | None = None) -> Features:
    return Features(torch.randn(n, 7), torch.randn(n, CELLS, TOKENS), mask, GRID)


def model(bottleneck: SlotBottleneck | None = None, concepts: int = CONCEPTS, **options: Any) -> CBMModule:
    torch.manual_seed(0)
    options = {"num_classes": 3, "loss_weights": WEIGHTS, **options}
    return CBMModule(ToyConv(), bottleneck or SlotBottleneck(width=8), concepts=concepts, **options)


def losses_of(bottleneck: SlotBottleneck, output: ConceptOutput, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    head = torch.nn.Identity()
    context = LossContext(ConceptLoss(), lambda logits, label: logits.sum(), head, torch.zeros(1))
    return bottleneck.losses(output, batch, context)


# ---------------------------------------------------------------- attention and presence


@pytest.mark.parametrize("options", [{}, {"competition": False}, {"initial_sum": 2.0}], ids=str)
def test_matches_the_equations_written_out(options: dict[str, Any]) -> None:
    bottleneck, seen = built(**options), features()
    found = bottleneck(seen)
    for b in range(4):
        cells, keys = [], []
        for j, token in enumerate(seen.tokens[b]):
            x = bottleneck.project.weight @ token + bottleneck.project.bias
            norm = bottleneck.norm
            x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            cells.append(x.clamp(min=0))
            place = torch.zeros(8)
            for half, share in ((0, (j // 4 + 0.5) / 3), (4, (j % 4 + 0.5) / 4)):
                for i in range(2):
                    angle = 2 * math.pi * share / 10000 ** (i / 2)
                    place[half + i], place[half + 2 + i] = math.sin(angle), math.cos(angle)
            keys.append(bottleneck.keys(cells[-1] + place))
        dots = torch.stack([torch.stack([q @ k / 8**0.5 for k in keys]) for q in bottleneck.queries])
        sums = [row.sum().abs() for row in dots]
        floor = 0.01 * sum(sums) / CONCEPTS
        for k in range(CONCEPTS):
            row = dots[k] * sum(sums) / max(sums[k], floor) if bottleneck.competition else dots[k]
            if bottleneck.threshold is not None:
                row = row + math.log(2.0 / 10.0)
            attention = 1 / (1 + torch.exp(-row))
            presence = torch.tanh(attention.sum())
            torch.testing.assert_close(found.maps[b, k].flatten(), attention, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.values[b, k], presence)
            torch.testing.assert_close(found.probs[b, k], presence)
            mean = sum(a * cell for a, cell in zip(attention, cells, strict=True)) / attention.sum()
            torch.testing.assert_close(found.extras["concept_features"][b, k], mean, rtol=1e-4, atol=1e-4)


def test_competition_is_the_official_one_where_sums_share_a_sign() -> None:
    for sign in (1, -1):
        dots = sign * (torch.rand(3, 5, 12) + 0.1)
        official = dots / dots.sum(2, keepdim=True) * dots.sum((1, 2), keepdim=True)
        torch.testing.assert_close(compete(dots), official)


def test_competition_turns_no_sign_and_divides_by_no_zero() -> None:
    dots = torch.randn(50, 5, 12)
    official = dots / dots.sum(2, keepdim=True) * dots.sum((1, 2), keepdim=True)
    assert (official.sign() != dots.sign()).any()
    assert torch.equal(compete(dots).sign(), dots.sign())
    sums, before = compete(dots).sum(2).abs(), dots.sum(2).abs()
    counted = before > 0.01 * before.mean(1, keepdim=True)
    expected = before.sum(1, keepdim=True).expand_as(sums)
    torch.testing.assert_close(sums[counted], expected[counted], rtol=1e-3, atol=1e-3)
    balanced = torch.tensor([[[1.0, -1.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    found = compete(balanced)
    # the floor is a hundredth of the mean sum, 2
    assert found.tolist() == [[[200.0, -200.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]
    found.sigmoid().sum().backward()
    assert balanced.grad.isfinite().all()


def test_logits_are_exact_where_presence_is_one() -> None:
    x = torch.tensor([1e-4, 0.3, 1.0, 3.0, 8.0])
    torch.testing.assert_close(tanh_logits(x).sigmoid(), x.tanh())
    large = torch.tensor([20.0, 30.0], requires_grad=True)
    assert (large.tanh() == 1).all()
    found = tanh_logits(large)
    torch.testing.assert_close(found, 2 * large - math.log(2))
    found.sum().backward()
    assert large.grad.tolist() == [2.0, 2.0]
    assert tanh_logits(torch.zeros(1)).isfinite()


def test_presence_starts_saturated_in_the_paper_and_not_with_a_threshold() -> None:
    seen = Features(torch.zeros(1, 7), torch.zeros(1, CELLS, TOKENS), None, GRID)
    for initial_sum, expected in ((None, CELLS / 2), (1.5, 1.5), (100.0, CELLS / 2)):
        bottleneck = built(initial_sum=initial_sum)
        with torch.no_grad():
            bottleneck.queries.zero_()
        output = bottleneck(seen)
        torch.testing.assert_close(output.maps.sum((2, 3)), torch.full((1, CONCEPTS), expected))
        torch.testing.assert_close(output.values, torch.full((1, CONCEPTS), math.tanh(expected)))


def test_places_are_told_apart_and_alike_on_every_grid() -> None:
    places = encode_places(3, 4, 16, torch.zeros(()))
    assert torch.pdist(places).min() > 0.1
    rows = places.unflatten(0, GRID)
    assert torch.equal(rows[1, 0, :8], rows[1, 3, :8])
    assert torch.equal(rows[0, 2, 8:], rows[2, 2, 8:])
    # the middle of three rows is the middle of five
    torch.testing.assert_close(encode_places(5, 4, 16, torch.zeros(())).unflatten(0, (5, 4))[2], rows[1])


def test_padded_cells_are_nowhere() -> None:
    mask = torch.rand(4, CELLS) < 0.7
    seen = features(mask=mask)
    other = Features(seen.pooled, torch.where(mask.unsqueeze(-1), seen.tokens, 9.0), mask, GRID)
    bottleneck = built()
    found, expected = bottleneck(seen), bottleneck(other)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.extras["concept_features"], expected.extras["concept_features"])
    assert not found.maps.flatten(2)[~mask[:, None].expand(-1, CONCEPTS, -1)].any()


def test_a_prediction_does_not_depend_on_its_batch() -> None:
    bottleneck, seen = built(), features(6)
    whole = bottleneck(seen)
    alone = bottleneck(Features(seen.pooled[2:3], seen.tokens[2:3], None, GRID))
    torch.testing.assert_close(alone.values, whole.values[2:3])
    torch.testing.assert_close(alone.maps, whole.maps[2:3])


# ---------------------------------------------------------------- losses


def test_the_losses_are_of_the_output() -> None:
    bottleneck = built()
    output, label = bottleneck(features(9)), torch.arange(9) % 3
    parts = losses_of(bottleneck, output, {"label": label})
    assert parts.keys() == LOSSES
    codes, maps = 2 * output.values - 1, output.maps
    torch.testing.assert_close(parts["retrieval"], retrieval_loss(codes, label))
    torch.testing.assert_close(parts["quantization"], (codes.abs() - 1).square().mean())
    torch.testing.assert_close(parts["area"], maps.mean())
    chosen = maps.sum((2, 3)) > maps.sum((2, 3)).mean(0)
    found = output.extras["concept_features"]
    torch.testing.assert_close(parts["consistency"], consistency_loss(found, chosen))
    torch.testing.assert_close(parts["distinctiveness"], distinctiveness_loss(found, chosen))


def test_reconstruction_compares_with_scaled_images() -> None:
    bottleneck = built(reconstruction=[1, 2, 4], hidden=9)
    output, image = bottleneck(features(3)), torch.randn(3, 1, 4, 8)
    kept = image.clone()
    parts = losses_of(bottleneck, output, {"label": torch.arange(3), "image": image})
    small = image.unflatten(2, (2, 2)).unflatten(4, (4, 2)).mean((3, 5))
    decoded = bottleneck.decode(output.values)
    assert decoded.shape == small.shape
    torch.testing.assert_close(parts["reconstruction"], (decoded - small).square().mean())
    assert torch.equal(image, kept)
    assert bottleneck.decoder[0].weight.shape == (9, CONCEPTS)
    with pytest.raises(ValueError, match=r"reconstruction: expected images \[B, 1, H, W\].*\[3, 3, 4, 4\]"):
        losses_of(bottleneck, output, {"label": torch.arange(3), "image": torch.randn(3, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"got \['embedding', 'label'\]; train on images"):
        losses_of(bottleneck, output, {"label": torch.arange(3), "embedding": torch.randn(3, 7)})
    with pytest.raises(ValueError, match="there is no decoder"):
        built().decode(output.values)


# ---------------------------------------------------------------- corrections


def test_a_correction_sets_the_presence() -> None:
    bottleneck = built()
    output = bottleneck(features(3))
    before = output.values.clone()
    mask = torch.tensor([[True, True, True, False, False]] * 3)
    fixed = bottleneck.intervene(output, Intervention(mask, torch.tensor([[1.0, 0.25, torch.nan, 1.0, 1.0]] * 3)))
    assert fixed.values[:, :3].tolist() == [[1.0, 0.25, 0.0]] * 3
    assert torch.equal(fixed.values[:, 3:], before[:, 3:])
    assert fixed.probs[:, :2].tolist() == [[1.0, 0.25]] * 3
    assert torch.equal(fixed.probs[:, 2:], before[:, 2:])
    assert torch.equal(fixed.maps, output.maps)
    assert torch.equal(output.values, before)
    by_logit = bottleneck.intervene(output, Intervention(mask, before, torch.full_like(before, 2.0)))
    torch.testing.assert_close(by_logit.values[:, :3], torch.full((3, 3), 2.0).sigmoid())
    assert bottleneck.directions(output).shape == (1, CONCEPTS, 1)


def test_contributions_add_up_and_a_concept_can_be_switched_off_for_all_samples() -> None:
    made = model().eval()
    batch = batch_of(4)
    with torch.no_grad():
        prediction = made(made.read_batch(batch))
        parts = made.head.contributions(prediction.concepts)
        off = made.intervene(prediction, {made.concept_set.names[1]: 0.0})
    torch.testing.assert_close(parts.concepts.sum(-1) + parts.other["bias"], prediction.logits)
    torch.testing.assert_close(off.logits, prediction.logits - parts.concepts[..., 1])
    assert made.backbone.calls == 1, "for the prediction"


# ---------------------------------------------------------------- in a run


def spot_of_a_colour(rows: Rows) -> Rows:
    """One spot an image, whose colour is the label; annotations say the colour, in another order."""
    label = torch.arange(len(rows["label"])) % 3
    masks = rows["concept_masks"].any(1, keepdim=True)
    colour = torch.eye(3)[label][..., None, None]
    image = 0.1 * rows["image"] * ~masks
    where = torch.zeros_like(masks)
    for i, (x, y) in enumerate(torch.randint(0, SIZE - 4, (len(label), 2), generator=torch.Generator().manual_seed(0))):
        where[i, :, y : y + 4, x : x + 4] = True
    concepts = torch.eye(3)[label][:, [2, 0, 1]]
    return {"image": image + where * colour, "concepts": concepts, "label": label}


def test_it_discovers_what_tells_the_classes_apart() -> None:
    made = model(SlotBottleneck(width=8, competition=False, initial_sum=1.0), concepts=4, lr=0.02)
    trainer = quiet_trainer(max_epochs=20, num_sanity_val_steps=0, limit_val_batches=0)
    data = ToyImages(n=96, n_eval=60, change=spot_of_a_colour, batch_size=32)
    trainer.fit(made, data)
    trainer.test(made, data, verbose=False)
    scores = trainer.callback_metrics
    assert scores["test/label_acc"] > 0.95
    assert {f"test/loss_{name}" for name in LOSSES} <= scores.keys()
    assert not [name for name in scores if "concept_" in name], "annotations are of other concepts"
    assert 1 <= scores["test/varying_concepts"] <= 4
    data.setup("test")
    batch = data.splits["test"].__getitems__(list(range(60)))
    with torch.no_grad():
        output = made.eval()(batch).concepts
    purity = ConceptPurity(3)
    purity.update(output.logits, batch["concepts"])
    assert purity.compute() > 0.8 > 2 * purity.summary().chance


@pytest.mark.parametrize("options", [{}, {"initial_sum": 1.0}, {"reconstruction": [3, 8, 8]}], ids=str)
def test_everything_gets_a_gradient_in_a_joint_step(options: dict[str, Any]) -> None:
    class Kept(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            grads.update({name: None if p.grad is None else p.grad.clone() for name, p in made.named_parameters()})

    grads: dict[str, Any] = {}
    made = model(SlotBottleneck(width=8, **options))
    quiet_trainer(callbacks=[Kept()], limit_train_batches=1, limit_val_batches=0).fit(made, ToyImages())
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    assert {"bottleneck.queries", "bottleneck.keys.0.weight", "head.linear.weight"} <= grads.keys()
    assert [name for name, grad in grads.items() if name.endswith(("weight", "queries")) and not grad.any()] == []


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_tasks(task: Any) -> None:
    rows = batch_of(12)
    rows["label"] = rows["concepts"][:, 0] if task == "binary" else rows["concepts"]
    loader = DataLoader(TensorDataset(rows), batch_size=4, collate_fn=TensorDataset.collate)
    trainer = quiet_trainer()
    trainer.fit(model(task=task, num_classes=2 if task == "binary" else 3), loader, loader)
    assert torch.isfinite(trainer.callback_metrics["val/loss_retrieval"])


def test_a_phase_without_the_label_is_refused() -> None:
    with pytest.raises(ValueError, match="without the label's gradient"):
        quiet_trainer(max_epochs=2).fit(model(phases="sequential"), ToyImages())


def test_a_misspelt_loss_is_named() -> None:
    with pytest.raises(ValueError, match="no loss is called .'retreival'.*did you mean .'retrieval'"):
        quiet_trainer().fit(model(loss_weights={"retreival": 1.0}), ToyImages())


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    bottleneck = SlotBottleneck(8, competition=False, initial_sum=1.0, reconstruction=[3, 4, 4], hidden=5)
    made = CBMModule(ToyConv(dropout=0.0), bottleneck, concepts=5, num_classes=3)
    trainer = quiet_trainer(callbacks=[keeper], enable_checkpointing=True, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(made, ToyImages())
    again = CBMModule.load_from_checkpoint(keeper.last_model_path, weights_only=True).eval()
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for found, expected in zip(again(image).concepts.tensors(), made.eval()(image).concepts.tensors(), strict=True):
            torch.testing.assert_close(found, expected)
    assert again.bottleneck.spec() == made.bottleneck.spec()


def test_half_precision_keeps_sums_exact() -> None:
    bottleneck, seen = built(), features(16)
    expected = bottleneck(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bottleneck(seen)
        parts = losses_of(bottleneck, found, {"label": torch.arange(16) % 3})
    assert {found.values.dtype, found.logits.dtype, found.maps.dtype} == {torch.float32}
    torch.testing.assert_close(found.values, expected.values, rtol=0.1, atol=0.1)
    torch.testing.assert_close(found.logits.sigmoid(), found.maps.sum((2, 3)).tanh(), rtol=1e-4, atol=1e-5)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    halved = copy.deepcopy(bottleneck).to(torch.bfloat16)
    assert halved(Features(seen.pooled, seen.tokens.bfloat16(), None, GRID)).values.dtype == torch.bfloat16


def test_forward_compiles_as_one_graph() -> None:
    bottleneck, seen = built(), features()

    class Values(torch.nn.Module):
        def forward(self, pooled: Tensor, tokens: Tensor) -> Tensor:
            return bottleneck(Features(pooled, tokens, None, GRID)).values

    compiled = torch.compile(Values(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(seen.pooled, seen.tokens), bottleneck(seen).values)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "width: expected a positive multiple of 4.*got 6"),
        ({"width": 0}, "width: .*got 0"),
        ({"initial_sum": 0.0}, "initial_sum: expected a positive number or None, got 0.0"),
        ({"reconstruction": [28, 28]}, r"reconstruction: expected \[channels, height, width\], got \[28, 28\]"),
        ({"reconstruction": [1, 0, 28]}, r"reconstruction: .*got \[1, 0, 28\]"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlotBottleneck(**options)


@pytest.mark.parametrize("dims", [FeatureDims(7), FeatureDims(7, 6), FeatureDims(7, 6, (2, 3, 3))])
def test_backbones_without_a_grid_are_refused(dims: FeatureDims) -> None:
    with pytest.raises(ValueError, match="needs patch tokens on a grid"):
        SlotBottleneck().build(dims, ConceptSet.make(3), 2)


def test_features_without_a_grid_are_refused() -> None:
    bottleneck = built()
    for seen in (Features(torch.zeros(1, 7)), Features(torch.zeros(1, 7), torch.zeros(1, CELLS, TOKENS))):
        with pytest.raises(ValueError, match=r"needs tokens on a grid \(h, w\), got features on None"):
            bottleneck(seen)


@pytest.mark.parametrize("kind", ["real", "categorical"])
def test_concepts_that_are_not_there_or_absent_are_refused(kind: str) -> None:
    groups = {"size": ["a", "b"]} if kind == "categorical" else {}
    with pytest.raises(ValueError, match=f"present or absent, got the kinds .*{kind}.*concepts=20"):
        SlotBottleneck().build(FeatureDims(7, TOKENS, GRID), ConceptSet(["a", "b"], groups, kind), 2)
