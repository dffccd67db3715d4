"""SL-CBM: maps that are the computation, its losses written out, and what its official code gets wrong."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toy import quiet_trainer
from toy_images import CLASSES, ForeignImages, ToyConv, ToyImages, batch_of, toy_model

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.bottlenecks import LinearBottleneck, SimilarityBottleneck, SpatialBottleneck
from cbm_lightning.bottlenecks.sl_cbm import annotated_l1, cell_entropy, mask_error, same_class_contrast
from cbm_lightning.heads import LinearHead, NormalizedHead
from cbm_lightning.saliency import NoExactMaps, SaliencyStudy, concept_maps
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import FeatureDims, Features, Intervention, LossContext, Prediction

N, GRID = 12, (3, 4)
CONCEPTS = ConceptSet(["a", "b", "c", "d"])
POOLS = ["attention", "max", "mean"]
every_pool = pytest.mark.parametrize("pool", POOLS)
ALL = ("entropy", "contrastive", "mask")


def built(concepts: ConceptSet = CONCEPTS, **options: Any) -> SpatialBottleneck:
    """With weights large enough to tell things apart."""
    bottleneck = SpatialBottleneck(**options)
    bottleneck.build(FeatureDims(5, 6, GRID), concepts, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return bottleneck.eval()


def features(batch: int = 3, padded: bool = False, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, N, generator=generator) < 0.6 if padded else None
    drawn = torch.randn(batch, 5, generator=generator), torch.randn(batch, N, 6, generator=generator)
    return Features(*drawn, mask, GRID)


def context() -> LossContext:
    return LossContext(torch.nn.BCEWithLogitsLoss(), lambda *_: torch.zeros(()), torch.nn.Identity(), torch.zeros(1))


# ---------------------------------------------------------------- the equations


def plain_attention(bottleneck: SpatialBottleneck, given: Features) -> tuple[Tensor, Tensor]:
    """Pooled scores ``[B, K]`` and attention ``[B, N]``, cell by cell."""
    pool, query = bottleneck.attention, bottleneck.query(given).logits
    scores, weights = [], []
    for b, tokens in enumerate(given.tokens):
        asked, matches, values = pool.query.weight @ query[b], [], []
        for n, token in enumerate(tokens):
            s = bottleneck.scores.weight @ token + bottleneck.scores.bias
            s = (s - s.mean()) / ((s - s.mean()) ** 2).mean().sqrt() * pool.norm.weight + pool.norm.bias
            real = given.mask is None or bool(given.mask[b, n])
            matches.append(torch.exp(asked @ (pool.key.weight @ s) / math.sqrt(len(s))) if real else torch.zeros(()))
            values.append(s)
        weight = torch.stack(matches) / sum(matches)
        weights.append(weight)
        scores.append(sum(a * v for a, v in zip(weight, values, strict=True)))
    return torch.stack(scores), torch.stack(weights)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_that_of_the_paper(padded: bool) -> None:
    bottleneck, given = built(), features(padded=padded)
    output = bottleneck(given)
    scores, weights = plain_attention(bottleneck, given)
    assert_close(output.logits, scores, rtol=1e-4, atol=1e-4)
    assert_close(output.extras["attention"], weights, rtol=1e-4, atol=1e-5)
    assert_close(output.extras["attention"].sum(1), torch.ones(3))
    assert_close(output.extras["scores"], given.tokens @ bottleneck.scores.weight.T + bottleneck.scores.bias)
    assert output.values is output.logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_the_other_poolings(pool: str, padded: bool) -> None:
    bottleneck, given = built(pool=pool), features(padded=padded)
    output = bottleneck(given)
    for b in range(3):
        kept = slice(None) if given.mask is None else given.mask[b]
        cells = given.tokens[b][kept] @ bottleneck.scores.weight.T + bottleneck.scores.bias
        assert_close(output.logits[b], cells.amax(0) if pool == "max" else cells.mean(0))
    assert "attention" not in output.extras


@pytest.mark.parametrize("padded", [False, True])
@every_pool
def test_the_maps_and_what_has_no_place_are_the_score(pool: str, padded: bool) -> None:
    """The official code shows ``S`` and computes with ``LN(S)``, so its maps do not add up."""
    bottleneck, given = built(pool=pool), features(padded=padded)
    output = bottleneck(given)
    maps = bottleneck.concept_maps(output)
    assert maps.shape == (3, 4, *GRID)
    shift = bottleneck.scores.bias if pool != "attention" else bottleneck.attention.norm.bias
    if pool == "max":
        real = torch.ones(3, N).bool() if given.mask is None else given.mask
        found = maps.flatten(2).masked_fill(~real[:, None], -torch.inf).amax(2)
    else:
        found = maps.mean((2, 3))
    assert_close(found + shift, output.logits, rtol=1e-5, atol=1e-5)
    if padded:
        assert maps.flatten(2).transpose(1, 2)[~given.mask].abs().max() == 0


def test_a_cell_that_nobody_attends_to_shows_nothing() -> None:
    bottleneck, given = built(), features()
    output = bottleneck(given)
    expected = (
        N
        * output.extras["attention"]
        * torch.nn.functional.layer_norm(output.extras["scores"], (4,), bottleneck.attention.norm.weight, eps=1e-6)[
            ..., 1
        ]
    )
    assert_close(output.maps[:, 1].flatten(1), expected)


@every_pool
def test_padding_does_not_matter(pool: str) -> None:
    bottleneck, given = built(pool=pool), features(padded=True)
    other = torch.where(given.mask[..., None], given.tokens, 100 * torch.randn_like(given.tokens))
    one, two = bottleneck(given), bottleneck(Features(given.pooled, other, given.mask, GRID))
    assert_close(one.logits, two.logits)
    assert_close(one.maps, two.maps)


@every_pool
def test_an_image_of_padding_alone_has_finite_scores_and_gradients(pool: str) -> None:
    bottleneck, given = built(pool=pool, losses=["entropy"]), features(padded=True)
    mask = given.mask.clone()
    mask[1] = False
    output = bottleneck(Features(given.pooled, given.tokens, mask, GRID))
    assert output.maps[1].abs().max() == 0
    assert_close(output.logits[1], (bottleneck.scores if pool != "attention" else bottleneck.attention.norm).bias)
    batch = {"concepts": torch.ones(3, 4), "label": torch.zeros(3)}
    sum(bottleneck.losses(output, batch, context()).values()).backward()
    assert all(p.grad.isfinite().all() for p in bottleneck.parameters() if p.grad is not None)


@every_pool
def test_a_sample_is_judged_alone(pool: str) -> None:
    bottleneck, given = built(pool=pool), features()
    alone = bottleneck(Features(given.pooled[1:2], given.tokens[1:2], grid=GRID))
    assert_close(alone.logits, bottleneck(given).logits[1:2])


def test_concept_vectors_may_ask() -> None:
    vectors = torch.randn(4, 5)
    concepts = ConceptSet(CONCEPTS.names, embeddings=vectors)
    bottleneck, given = built(concepts, query=SimilarityBottleneck(standardize=False, scale=1.0)), features()
    query = torch.nn.functional.normalize(given.pooled, dim=-1) @ torch.nn.functional.normalize(vectors, dim=-1).T
    assert_close(bottleneck.query(given).logits, query)
    assert_close(bottleneck(given).logits, plain_attention(bottleneck, given)[0], rtol=1e-4, atol=1e-4)
    assert "query.texts" in bottleneck.state_dict()


# ---------------------------------------------------------------- losses


def test_entropy_is_a_mean_over_real_cells_and_does_not_grow_with_the_grid() -> None:
    scores = 3 * torch.randn(2, 5, 4)
    each = torch.tensor([[torch.distributions.Categorical(logits=s).entropy() for s in image] for image in scores])
    assert_close(cell_entropy(scores, None), each.mean())
    mask = torch.tensor([[True] * 5, [True, False, False, False, False]])
    assert_close(cell_entropy(scores, mask), torch.cat([each[0], each[1, :1]]).mean())
    assert_close(cell_entropy(scores.repeat(1, 7, 1), None), each.mean())
    assert_close(cell_entropy(torch.zeros(1, 1, 4), None), torch.tensor(math.log(4)))
    assert cell_entropy(torch.tensor([[[500.0, 0.0]]]), None) == 0


@pytest.mark.parametrize("several", [False, True])
def test_contrast_is_the_cross_entropy_of_finding_a_sample_of_the_class(several: bool) -> None:
    scores, label = torch.randn(7, 4), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    found = []
    for i in range(7):
        company = [j for j in range(7) if j != i and label[j] == label[i]]
        cosine = [float(torch.cosine_similarity(scores[i], scores[j], 0)) for j in range(7)]
        total = sum(math.exp(cosine[j]) for j in range(7) if j != i)
        terms = [-math.log(math.exp(cosine[j]) / total) for j in company]
        found += [sum(terms) / len(terms)] if terms else []
    given = torch.nn.functional.one_hot(label) if several else label
    assert_close(same_class_contrast(scores, given), torch.tensor(found).mean())


@pytest.mark.parametrize("label", [[0, 1, 2], [0]])
def test_contrast_without_company_is_zero_with_a_gradient(label: list[int]) -> None:
    scores = torch.randn(len(label), 4, requires_grad=True)
    loss = same_class_contrast(scores, torch.tensor(label))
    loss.backward()
    assert loss == 0
    assert scores.grad.abs().max() == 0


def test_contrast_pushes_no_samples_of_a_class_apart() -> None:
    """The official code calls every pair but a sample's own wrong, those of the same class included."""
    scores = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.9, 0.0], [0.0, 1.0]], requires_grad=True)
    same_class_contrast(scores, torch.tensor([0, 0, 0, 1])).backward()
    moved = torch.nn.functional.normalize((scores - 0.1 * scores.grad).detach(), dim=-1)
    before = torch.nn.functional.normalize(scores.detach(), dim=-1)
    assert (moved[:3] @ moved[:3].T).mean() > (before[:3] @ before[:3].T).mean()


def test_mask_error_compares_cells_with_covered_shares_where_that_is_known() -> None:
    maps, masks = torch.randn(2, 3, 2, 2), torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    masks[0, 0, 0, 1:3] = True  # half of two cells
    concepts = torch.tensor([[1.0, 1.0, 0.0], [torch.nan, 0.2, 0.0]])
    share = torch.zeros(2, 2)
    share[0] = torch.tensor([0.25, 0.25])
    terms = [(maps[0, 0] - share).square().mean(), maps[0, 2].square().mean(), maps[1, 2].square().mean()]
    assert_close(mask_error(maps, masks, concepts), torch.stack(terms).mean())
    # nobody drew the masks of the second image, which may be said by NaN too
    unknown = masks.float()
    unknown[1] = torch.nan
    assert_close(mask_error(maps, unknown, concepts), torch.stack(terms).mean())
    assert mask_error(maps, torch.zeros_like(masks), torch.ones(2, 3)) == 0


def test_l1_counts_annotations_only() -> None:
    probs = torch.tensor([[0.9, 0.2], [0.4, 0.7]])
    concepts = torch.tensor([[1.0, torch.nan], [0.5, 0.0]])
    assert_close(annotated_l1(probs, concepts), torch.tensor((0.1 + 0.1 + 0.7) / 3))
    assert annotated_l1(probs, torch.full((2, 2), torch.nan)) == 0
    bottleneck, given = built(concept_loss="l1"), features()
    output, truth = bottleneck(given), torch.ones(3, 4)
    found = bottleneck.losses(output, {"concepts": truth}, context())
    assert found.keys() == {"concept"}
    assert_close(found["concept"], (1 - output.logits.sigmoid()).mean())


@pytest.mark.parametrize("names", [(), ("entropy",), ("contrastive",), ("mask",), ALL], ids=str)
def test_only_losses_that_are_asked_for_are_computed(names: tuple[str, ...]) -> None:
    bottleneck, given = built(losses=list(names)), features()
    masks = torch.rand(3, 4, 6, 8) < 0.3
    batch = {"concepts": torch.ones(3, 4), "label": torch.tensor([0, 0, 1]), "concept_masks": masks}
    output = bottleneck(given)
    found = bottleneck.losses(output, batch, context())
    assert found.keys() == {"concept", *names}
    cells = output.extras["scores"]
    expected = {
        "entropy": cell_entropy(cells, None),
        "contrastive": same_class_contrast(output.logits, batch["label"]),
        "mask": mask_error(
            bottleneck.attention.norm(cells).sigmoid().transpose(1, 2).unflatten(2, GRID), masks, batch["concepts"]
        ),
    }
    for name in names:
        assert_close(found[name], expected[name])


def test_masks_may_be_absent_from_evaluation_but_not_from_training() -> None:
    bottleneck = built(losses=["mask"])
    output, batch = bottleneck(features()), {"concepts": torch.ones(3, 4)}
    assert bottleneck.losses(output, batch, context()).keys() == {"concept"}
    with bottleneck.drawing(torch.Generator()), pytest.raises(ValueError, match="needs concept_masks"):
        bottleneck.losses(output, batch, context())


# ---------------------------------------------------------------- options


def test_bad_options_name_the_field() -> None:
    for field, options in {
        "pool": {"pool": "median"},
        "query": {"pool": "max", "query": LinearBottleneck("logits")},
        "concept_loss": {"concept_loss": "l2"},
        "losses": {"losses": ["entropie"]},
        "link": {"link": "exp"},
    }.items():
        with pytest.raises(ValueError, match=f"^{field}:"):
            SpatialBottleneck(**options)
    with pytest.raises(ValueError, match="^losses: expected a list"):
        SpatialBottleneck(losses="mask")


def test_what_cannot_be_built_is_refused() -> None:
    dims = FeatureDims(5, 6, GRID)
    with pytest.raises(ValueError, match="backbone with patch tokens"):
        SpatialBottleneck().build(FeatureDims(5), CONCEPTS, 3)
    with pytest.raises(ValueError, match="two or more, got 1"):
        SpatialBottleneck().build(dims, ConceptSet(["a"]), 3)
    SpatialBottleneck(pool="mean").build(dims, ConceptSet(["a"]), 3)
    with pytest.raises(ValueError, match=r"\['size'\] are real-valued"):
        SpatialBottleneck(losses=["mask"]).build(dims, ConceptSet(["a", "size"], kinds=["binary", "real"]), 3)
    with pytest.raises(ValueError, match="got pooled features alone"):
        built()(Features(torch.zeros(2, 5)))


def test_tokens_without_a_grid_have_scores_but_no_maps() -> None:
    bottleneck, given = built(), features()
    output = bottleneck(Features(given.pooled, given.tokens))
    assert_close(output.logits, bottleneck(given).logits)
    assert output.maps is None
    with pytest.raises(ValueError, match="expected tokens on a grid"):
        bottleneck.concept_maps(output)


def test_kinds_of_concepts() -> None:
    concepts = ConceptSet(["x", "y", "size", "wet"], {"g": ["x", "y"]}, ["categorical"] * 2 + ["real", "binary"])
    output = built(concepts)(features())
    assert_close(output.probs[:, :2].sum(1), torch.ones(3))
    assert_close(output.probs[:, 2], output.logits[:, 2])


@pytest.mark.parametrize("link", ["logits", "sigmoid"])
def test_a_correction_overwrites_the_score_that_the_head_reads(link: str) -> None:
    bottleneck = built(link=link)
    low, high = (-3.0, 2.0) if link == "logits" else (0.0, 1.0)
    bottleneck.value_range.copy_(torch.tensor([[low], [high]]).expand(2, 4))
    output = bottleneck(features())
    mask = torch.tensor([[True, True, True, False]]).expand(3, -1)
    values = torch.tensor([[1.0, 0.0, torch.nan, 1.0]]).expand(3, -1)
    fixed = bottleneck.intervene(output, Intervention(mask, values))
    assert_close(fixed.values[:, :3], torch.tensor([[high, low, 0.0]]).expand(3, -1))
    assert_close(fixed.values[:, 3], (output.probs if link == "sigmoid" else output.logits)[:, 3])
    assert fixed.maps is output.maps
    nothing = bottleneck.intervene(output, Intervention(torch.zeros(3, 4).bool(), values))
    assert torch.equal(nothing.values, output.values)


# ---------------------------------------------------------------- precision and compilers


@every_pool
def test_sums_are_exact_in_half_precision_too(pool: str) -> None:
    bottleneck, given = built(pool=pool), features()
    single = bottleneck(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bottleneck(given)
        found = bottleneck.losses(half, {"concepts": torch.ones(3, 4)}, context())
    assert half.logits.dtype == torch.bfloat16
    assert half.maps.dtype == torch.float32
    assert_close(half.logits.float(), single.logits, rtol=0.1, atol=0.1)
    assert found["concept"].isfinite()
    whole = copy.deepcopy(bottleneck).bfloat16()
    half = whole(Features(given.pooled.bfloat16(), given.tokens.bfloat16(), grid=GRID))
    assert half.logits.dtype == torch.bfloat16
    assert_close(half.logits.float(), single.logits, rtol=0.1, atol=0.2)


@every_pool
def test_it_compiles_whole(pool: str) -> None:
    bottleneck, given = built(pool=pool), features(padded=True)
    compiled = torch.compile(lambda x: bottleneck(x).logits, backend="eager", fullgraph=True)
    assert_close(compiled(given), bottleneck(given).logits)


# ---------------------------------------------------------------- the whole model


def model_of(**options: Any) -> CBMModule:
    return toy_model(SpatialBottleneck(**options), lambda: ToyConv(dropout=0.0), lr=0.02)


@pytest.mark.parametrize(
    "options", [{"losses": list(ALL)}, {"pool": "max", "losses": list(ALL)}, {"pool": "mean", "concept_loss": "l1"}]
)
def test_training_moves_every_parameter(options: dict[str, Any]) -> None:
    model = model_of(**options)
    assert isinstance(model.head, NormalizedHead)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(model, ToyImages())
    named = {f"train/loss_{name}" for name in options.get("losses", [])}
    assert named <= trainer.callback_metrics.keys()
    # what does not react to a step may get no gradient, which data parallel training refuses
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_gradients_reach_every_parameter_in_the_first_step() -> None:
    model = model_of(losses=["entropy"])
    model(batch_of()["image"]).logits.sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_every_task_and_missing_annotations(task: str) -> None:
    def change(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        label = {"binary": rows["label"].clamp(max=1), "multilabel": rows["concepts"].long()}.get(task, rows["label"])
        concepts = rows["concepts"].clone()
        concepts[0], concepts[1, 0] = torch.nan, 0.7
        return {**rows, "label": label, "concepts": concepts}

    bottleneck = SpatialBottleneck(losses=list(ALL), randint=0.5)
    model = toy_model(bottleneck, num_classes=2 if task == "binary" else 3, class_names=None, task=task)
    data = ForeignImages(change=change)
    trainer = quiet_trainer()
    trainer.fit(model, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_masks_teach_where_to_look() -> None:
    """Trained on spots, its maps lie on them; without, the same model hardly places them."""
    found = {}
    for name, losses in (("masks", ["mask"]), ("untrained", [])):
        model = model_of(losses=losses)
        if losses:
            model.loss_weights = {"mask": 20.0}
            quiet_trainer(max_epochs=8).fit(model, ToyImages(n=96, batch_size=16))
        study = SaliencyStudy(model.eval(), "exact", ["energy_in_mask"])
        study.update(batch_of(40, seed=5))
        found[name] = float(study.compute().values["energy_in_mask"])
    area = 16 / 256
    assert found["masks"] > 5 * area > found["untrained"]


def test_a_correction_runs_no_backbone_and_moves_the_label() -> None:
    model = model_of().eval()
    with torch.inference_mode():
        prediction = model(batch_of())
        calls = model.backbone.calls
        fixed = model.intervene(prediction, {"red": 1.0})
        plain = model.intervene(prediction, {})
    assert model.backbone.calls == calls
    assert isinstance(fixed, Prediction)
    assert not torch.equal(fixed.logits, prediction.logits)
    assert torch.equal(plain.logits, prediction.logits)


def test_exact_maps_of_the_model_need_one_pass() -> None:
    model = toy_model(SpatialBottleneck()).eval()
    image = batch_of()["image"]
    calls = model.backbone.calls
    maps = concept_maps(model, image, "exact", resolution="method")
    assert model.backbone.calls == calls + 1
    output = model(image).concepts
    assert_close(maps, output.maps)
    assert_close(maps.mean((2, 3)) + model.bottleneck.attention.norm.bias, output.logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    """The official one lacks what is frozen, the concept vectors among it."""

    class Encoder(torch.nn.Module):
        def encode(self, texts: list[str]) -> Tensor:
            return torch.randn(len(texts), 8)

    bottleneck = SpatialBottleneck(query=SimilarityBottleneck(Encoder(), standardize=False), losses=["entropy"])
    model = toy_model(bottleneck)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(model, ToyImages())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = CBMModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    image = batch_of()["image"]
    assert_close(restored(image).logits, model.eval()(image).logits)
    assert restored.bottleneck.query.texts.norm() > 0
    assert restored.bottleneck.extra_losses == ("entropy",)
    assert_close(copy.deepcopy(restored)(image).logits, restored(image).logits)


def test_features_computed_before_bring_tokens() -> None:
    """Without a grid there are no maps, and the saliency says so."""
    model = toy_model(SpatialBottleneck(), head=LinearHead()).eval()
    prediction = model({"tokens": torch.randn(4, 10, 8)})
    assert prediction.logits.shape == (4, len(CLASSES))
    assert prediction.concepts.maps is None
    with pytest.raises(NoExactMaps, match="tokens on a grid"):
        Subject(model).exact_maps(prediction.concepts)


def test_randint_of_the_query_is_refused() -> None:
    with pytest.raises(ValueError, match="query: only its scores are read; give randint"):
        SpatialBottleneck(query=LinearBottleneck(randint=0.5))
