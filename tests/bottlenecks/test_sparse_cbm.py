"""ConceptLayerBottleneck: the layer on similarities, and its regularizers against plain loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from recorder import Log
from toy import CLASSES, WIDTH, ToyData, quiet_trainer

from cbm_lightning import CBMModule
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import ConceptLayerBottleneck, SimilarityBottleneck
from cbm_lightning.bottlenecks.sparse_cbm import (
    cubed_cosine,
    gumbel_entropy,
    gumbel_log_softmax,
    partner_loss,
    reference_gumbel_loss,
)
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.types import FeatureDims, Features, Intervention, LossContext

REGULARIZERS = ["gumbel", "gumbel_reference", "contrastive", "l1", "similarity"]
K, D = 5, 7
TEXTS = torch.randn(K, D, generator=torch.Generator().manual_seed(5))
CONCEPTS = ConceptSet(list("abcde"), embeddings=TEXTS)


def make(concepts: ConceptSet = CONCEPTS, width: int = D, **options) -> ConceptLayerBottleneck:
    bottleneck = ConceptLayerBottleneck(**options)
    bottleneck.build(FeatureDims(width), concepts, num_classes=3)
    return bottleneck


def losses_of(bottleneck: ConceptLayerBottleneck, output, concepts=None) -> dict[str, torch.Tensor]:
    loss = ConceptLoss()
    loss.build(bottleneck.concepts)
    context = LossContext(loss, lambda logits, label: logits.sum(), torch.nn.Identity(), torch.zeros(1, 3))
    return bottleneck.losses(output, {} if concepts is None else {"concepts": concepts}, context)


# ---------------------------------------------------------------- the layer


def test_it_begins_as_the_similarities_with_the_texts() -> None:
    features = Features(torch.randn(20, D))
    plain = SimilarityBottleneck()
    plain.build(FeatureDims(D), CONCEPTS, 3)
    torch.testing.assert_close(make().train()(features).values, plain.train()(features).values)


def test_the_layer_mixes_the_similarities() -> None:
    bottleneck = make(standardize=False, scale=10.0)
    torch.nn.init.normal_(bottleneck.layer.weight)
    pooled = torch.randn(6, D)
    output = bottleneck(Features(pooled))
    weight = bottleneck.layer.weight.tolist()
    for b in range(6):
        cosines = [float(pooled[b] @ t / pooled[b].norm() / t.norm()) for t in TEXTS]
        for k in range(K):
            expected = sum(weight[k][m] * 10 * cosines[m] for m in range(K))
            assert output.logits[b, k].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(output.values, output.logits)
    torch.testing.assert_close(output.probs, output.logits.sigmoid())


def test_standardisation_removes_the_scale_of_the_clip_model() -> None:
    # similarities of clip models lie in a narrow band far from zero, times 100
    common = torch.nn.functional.normalize(torch.randn(D), dim=0)
    features = Features(0.05 * torch.randn(500, D) + common)
    narrow = ConceptSet(list("abcde"), embeddings=TEXTS + 4 * common)
    raw = make(narrow, standardize=False)(features).values
    assert raw.mean() > 50
    values = make(narrow).train()(features).values
    torch.testing.assert_close(values.mean(0), torch.zeros(K), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(K), atol=1e-3, rtol=0)


def test_corrections_overwrite_what_the_head_reads() -> None:
    bottleneck = make()
    bottleneck.fit_statistics(z := torch.randn(200, K) * 3, z.sigmoid())
    output = bottleneck(Features(torch.randn(2, D)))
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    values = torch.tensor([[1.0, 0.0, float("nan"), 1.0, 1.0]] * 2)
    fixed = bottleneck.intervene(output, Intervention(mask, values))
    low, high = torch.quantile(z, torch.tensor([0.05, 0.95]), dim=0)
    torch.testing.assert_close(fixed.values[0, :3], torch.stack([high[0], low[1], torch.tensor(0.0)]))
    torch.testing.assert_close(fixed.values[:, 3:], output.values[:, 3:])


def test_maps_add_up_to_the_activation() -> None:
    bottleneck = make(standardize=False)
    torch.nn.init.normal_(bottleneck.layer.weight)
    tokens = torch.randn(3, 6, D)
    output = bottleneck(Features(tokens.mean(1), tokens, grid=(2, 3)))
    maps = bottleneck.concept_maps(output)
    assert maps.shape == (3, K, 2, 3)
    torch.testing.assert_close(maps.mean((2, 3)), output.logits, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------- regularizers


def test_entropy_of_the_gumbel_softmax_against_a_loop() -> None:
    z, temperature = torch.randn(4, K), 0.7
    noise = -(-torch.rand(4, K, generator=torch.Generator().manual_seed(3)).log()).log()
    noise_of_images = -(-torch.rand(8, K, generator=torch.Generator().manual_seed(3))[4:].log()).log()

    def entropy(scores: list[float]) -> float:
        weights = [math.exp(s / temperature) for s in scores]
        shares = [w / sum(weights) for w in weights]
        return -sum(p * math.log(p) for p in shares) / math.log(len(shares))

    for generator, of_concepts, of_images in (
        (None, z, z),
        (torch.Generator().manual_seed(3), z + noise_of_images, z + noise),
    ):
        rows = sum(entropy(row) for row in of_concepts.tolist()) / 4
        columns = sum(entropy(column) for column in of_images.T.tolist()) / K
        found = gumbel_entropy(z, temperature, generator)
        assert found.item() == pytest.approx((rows + columns) / 2, abs=1e-5)


def test_the_entropy_is_small_for_sparse_activations_and_the_reference_formula_is_not() -> None:
    flat, sparse = torch.zeros(6, 6), 50 * torch.eye(6)
    assert gumbel_entropy(flat).item() == pytest.approx(1.0)
    assert gumbel_entropy(sparse).item() < 1e-6
    draws = [torch.Generator().manual_seed(0) for _ in range(4)]
    assert gumbel_entropy(sparse, generator=draws[0]) < gumbel_entropy(flat, generator=draws[1])
    assert reference_gumbel_loss(sparse, generator=draws[2]) > reference_gumbel_loss(flat, generator=draws[3])


def test_the_reference_formula_against_torch() -> None:
    # uniform scores have the least of it: 5.80 against 6.16 and 13.2 was measured with the official code
    draw = torch.Generator().manual_seed(0)
    found = [reference_gumbel_loss(s * torch.randn(128, 64, generator=draw), 1.0, draw).item() for s in (0, 1, 5, 20)]
    assert found[:3] == pytest.approx([5.80, 6.16, 13.2], rel=0.05)
    assert found[2] < found[3] < math.inf
    z = torch.randn(128, 64, generator=draw)
    torch.manual_seed(0)
    official = [-torch.nn.functional.gumbel_softmax(z, dim=dim).log().mean() for dim in (0, 1)]
    assert reference_gumbel_loss(z, 1.0, draw).item() == pytest.approx(0.5 * sum(official).item(), rel=0.02)


def test_draws_are_of_the_generator_and_there_are_none_without() -> None:
    z = torch.randn(4, K)
    torch.testing.assert_close(gumbel_log_softmax(z, 1, 1.0, None), z.log_softmax(1))
    first, second = (gumbel_log_softmax(z, 1, 1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, z.log_softmax(1))
    bottleneck = make()
    output = bottleneck(Features(torch.randn(4, D)))
    still = losses_of(bottleneck, output)["gumbel"]
    assert torch.equal(losses_of(bottleneck, output)["gumbel"], still)
    with bottleneck.drawing(torch.Generator().manual_seed(0)):
        assert not torch.equal(losses_of(bottleneck, output)["gumbel"], still)


def test_a_single_image_or_concept_has_an_entropy() -> None:
    assert gumbel_entropy(torch.zeros(1, 4)).item() == pytest.approx(1.0)
    assert gumbel_entropy(torch.zeros(4, 1)).item() == pytest.approx(1.0)
    assert gumbel_entropy(torch.zeros(1, 1)).item() == 0.0


def test_partners_are_the_most_similar_and_not_the_ones_of_the_same_number() -> None:
    z, a = torch.randn(4, 3), torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.1, 0.8], [0.9, 0.2, 0.1], [0.0, 0.1, 0.7]])
    images = [1, 2, 0, 2]
    concepts = [2, 0, 1]
    rows = sum(-math.log(math.exp(z[b, k]) / sum(math.exp(s) for s in z[b])) for b, k in enumerate(images)) / 4
    columns = sum(-math.log(math.exp(z[b, k]) / sum(math.exp(s) for s in z[:, k])) for k, b in enumerate(concepts)) / 3
    assert partner_loss(z, a).item() == pytest.approx((rows + columns) / 2, abs=1e-5)
    # whichever the order of the images, the loss is the same
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(partner_loss(z[order], a[order]), partner_loss(z, a))


def test_the_cubed_cosine_against_a_loop() -> None:
    z, a = torch.randn(9, 3), torch.randn(9, 3)
    total = 0.0
    for k in range(3):
        u, v = z[:, k] - z[:, k].mean(), a[:, k] - a[:, k].mean()
        u, v = (u / u.norm()) ** 3, (v / v.norm()) ** 3
        total += float(u @ v / u.norm() / v.norm())
    assert cubed_cosine(z, a).item() == pytest.approx(total / 3, abs=1e-5)
    assert cubed_cosine(a, a).item() == pytest.approx(1.0)
    assert cubed_cosine(-3 * a + 1, a).item() == pytest.approx(-1.0)
    constant = torch.zeros(9, 3, requires_grad=True)
    cubed_cosine(constant, a).backward()
    assert constant.grad.isfinite().all()


def test_l1_is_of_the_weights() -> None:
    bottleneck = make(regularizer="l1")
    torch.nn.init.normal_(bottleneck.layer.weight)
    found = losses_of(bottleneck, bottleneck(Features(torch.randn(4, D))))
    torch.testing.assert_close(found["l1"], bottleneck.layer.weight.abs().sum() / K)


@pytest.mark.parametrize("names", [[], ["gumbel"], ["l1", "similarity"], REGULARIZERS])
def test_regularizers_are_losses_of_their_names(names: list[str]) -> None:
    bottleneck = make(regularizer=names)
    output = bottleneck.train()(Features(torch.randn(8, D)))
    found = losses_of(bottleneck, output)
    assert list(found) == names
    assert all(loss.ndim == 0 and loss.isfinite() for loss in found.values())


def test_half_precision_does_not_round_the_losses() -> None:
    bottleneck = make(regularizer=REGULARIZERS, standardize=False)
    features = Features(torch.randn(8, D))
    plain = losses_of(bottleneck, bottleneck(features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = bottleneck(features)
        assert output.logits.dtype == torch.bfloat16
        rounded = losses_of(bottleneck, output)
    assert {loss.dtype for loss in rounded.values()} == {torch.float32}
    for name in ("l1", "contrastive", "similarity"):
        torch.testing.assert_close(rounded[name], plain[name], rtol=0.05, atol=0.02)


def test_annotations_are_an_option() -> None:
    features, concepts = Features(torch.randn(8, D)), (torch.rand(8, K) < 0.5).float()
    concepts[0] = float("nan")
    bottleneck = make(regularizer=[], supervised=True)
    assert bottleneck.needs_concepts
    assert not make().needs_concepts
    assert make(randint=0.2).needs_concepts
    output = bottleneck(features)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits[1:], concepts[1:])
    torch.testing.assert_close(losses_of(bottleneck, output, concepts)["concept"], expected)


def test_effective_concepts() -> None:
    bottleneck = make(standardize=False)
    output = bottleneck(Features(torch.randn(2, D)))
    z = torch.tensor([[0.0, 50.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert bottleneck.diagnostics(output.replace(logits=z))["effective_concepts"].item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regularizer": "l2"}, "regularizer"),
        ({"regularizer": ["l1", "entropy"]}, "regularizer"),
        ({"regularizer": ["l1", "l1"]}, "regularizer"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"link": "tanh"}, "link"),
    ],
)
def test_bad_options_name_the_field(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        ConceptLayerBottleneck(**options)


# ---------------------------------------------------------------- whole models


def toy_model(regularizer=("gumbel",), **options) -> CBMModule:
    torch.manual_seed(0)
    texts = torch.eye(WIDTH)[:4]
    concepts = ConceptSet(ToyData().concept_set.names, embeddings=texts)
    bottleneck = ConceptLayerBottleneck(regularizer=list(regularizer), **options.pop("bottleneck", {}))
    return CBMModule(Identity(WIDTH), bottleneck, concepts=concepts, num_classes=CLASSES, **{"lr": 0.02, **options})


class Unannotated(ToyData):
    """Numbers and labels, without concepts."""

    def tensors(self, name: str):
        return {key: rows for key, rows in super().tensors(name).items() if key != "concepts"}

    def annotations(self, split: str):
        raise KeyError(split)


@pytest.mark.parametrize("data", [ToyData, Unannotated])
def test_layer_and_head_both_learn(data: type[LightningDataModule]) -> None:
    log, model = Log(), toy_model(REGULARIZERS, loss_weights={"l1": 0.1, "gumbel": 0.1})
    before = copy.deepcopy(model.state_dict())
    quiet_trainer(logger=log, max_epochs=3).fit(model, data())
    assert not model.head.bias
    for name in ("bottleneck.layer.weight", "head.linear.weight"):
        assert not torch.equal(model.state_dict()[name], before[name])
    assert torch.equal(model.bottleneck.texts, before["bottleneck.texts"])
    logged = {name for row in log.rows for name in row}
    assert {f"val/loss_{name}" for name in (*REGULARIZERS, "label")} <= logged
    assert "val/effective_concepts" in logged
    assert "val/loss_concept" not in logged


@pytest.mark.parametrize(("name", "sparser"), [("gumbel", True), ("contrastive", True), ("gumbel_reference", False)])
def test_what_the_regularizers_do_to_the_activations(name: str, sparser: bool) -> None:
    bottleneck = make(regularizer=name).train()
    features, draw = Features(torch.randn(64, D)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(bottleneck.parameters(), 0.05)
    before = bottleneck.diagnostics(bottleneck(features))["effective_concepts"]
    for _ in range(40):
        with bottleneck.drawing(draw):
            losses_of(bottleneck, bottleneck(features))[name].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = bottleneck.diagnostics(bottleneck(features))["effective_concepts"]
    assert (after < before - 0.5) if sparser else (after > before + 0.5)


def test_annotations_are_missed_where_they_are_needed() -> None:
    with pytest.raises(ValueError, match="the batch has no 'concepts'"):
        quiet_trainer().fit(toy_model(bottleneck={"supervised": True}), Unannotated())


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels(task: str) -> None:
    texts = ConceptSet(list("abc"), embeddings=torch.eye(3, 6))
    classes = 2 if task == "binary" else 3
    model = CBMModule(Identity(6), ConceptLayerBottleneck(), concepts=texts, num_classes=classes, task=task)
    label = torch.randint(2, (8,) if task == "binary" else (8, 3))
    prediction = model({"embedding": torch.randn(8, 6)})
    total, _ = model.losses(prediction.logits, prediction.concepts, {"label": label.float()})
    total.backward()
    assert model.bottleneck.layer.weight.grad.abs().sum() > 0


def test_checkpoints_need_no_texts(tmp_path: Path) -> None:
    model = toy_model(["l1", "gumbel"])
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = CBMModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert restored.bottleneck.regularizers == ["l1", "gumbel"]
    x = {"embedding": torch.randn(5, WIDTH)}
    torch.testing.assert_close(restored(x).logits, model.eval()(x).logits)
    torch.testing.assert_close(copy.deepcopy(restored)(x).logits, restored(x).logits)
