"""ConceptMatrixHead: signatures from texts, three measures against plain loops, and models that are never trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorder import Log
from tiny_clip import VIT
from toy import quiet_trainer

from cbm_lightning import CBMModule
from cbm_lightning.backbones import Identity, OpenClipTextEncoder
from cbm_lightning.bottlenecks import EmbeddingBottleneck, LinearBottleneck, SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data import PrecomputedFeatures
from cbm_lightning.heads import ConceptMatrixHead
from cbm_lightning.types import ClassFacts, ConceptOutput, FeatureDims, Features, Intervention, ValueLayout

K, L, D = 6, 4, 5
DRAW = torch.Generator().manual_seed(2)
CONCEPT_TEXTS, CLASS_TEXTS = torch.randn(K, D, generator=DRAW), torch.randn(L, D, generator=DRAW)
CONCEPTS = ConceptSet(list("abcdef"), embeddings=CONCEPT_TEXTS)
MEASURES = ["cosine", "cubed", "max", "correlation"]


def make(
    similarity: str = "cosine",
    concepts: ConceptSet = CONCEPTS,
    classes: torch.Tensor | None = CLASS_TEXTS,
    task: Any = "multiclass",
    **options: Any,
) -> ConceptMatrixHead:
    head = ConceptMatrixHead(similarity=similarity, **options)
    head.introduce(concepts, ClassFacts(embeddings=classes))
    head.build(FeatureDims(D), ValueLayout(len(concepts)), 2 if task == "binary" else L, task)
    return head


def output_of(values: torch.Tensor) -> ConceptOutput:
    return ConceptOutput(Features(torch.zeros(len(values), D)), values, values.sigmoid(), values)


def cosine(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)


def model(head: ConceptMatrixHead | None = None, data: Any = None, **options: Any) -> CBMModule:
    bottleneck = SimilarityBottleneck(standardize=False, scale=1.0)
    return CBMModule(Identity(D), bottleneck, head or ConceptMatrixHead(), data, **options)


@pytest.fixture
def data(tmp_path: Path) -> PrecomputedFeatures:
    """Images that lie near the text of their class."""
    label = np.arange(80) % L
    images = CLASS_TEXTS.numpy()[label] + 0.3 * np.random.default_rng(0).normal(size=(80, D))
    texts = {"text_embeddings": CONCEPT_TEXTS.numpy(), "class_embeddings": CLASS_TEXTS.numpy()}
    np.savez(tmp_path / "a.npz", embedding=images.astype(np.float32), label=label, **texts)
    return PrecomputedFeatures(str(tmp_path / "a.npz"))


# ---------------------------------------------------------------- the measures


def test_signatures_are_the_cosines_of_class_and_concept_texts() -> None:
    signatures = make().signatures
    assert not signatures.requires_grad
    for y in range(L):
        for k in range(K):
            expected = cosine(CLASS_TEXTS[y].tolist(), CONCEPT_TEXTS[k].tolist())
            assert signatures[y, k].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("similarity", MEASURES)
def test_the_measures_against_loops(similarity: str) -> None:
    head, values = make(similarity, scale=7.0), 0.3 * torch.randn(9, K)
    logits = head(output_of(values))
    for b, row in enumerate(values.tolist()):
        for y, signature in enumerate(head.signatures.tolist()):
            match similarity:
                case "cosine":
                    expected = cosine(row, signature)
                case "cubed":
                    expected = cosine([x**3 for x in row], [x**3 for x in signature])
                case "correlation":
                    expected = np.corrcoef(row, signature)[0, 1]
                case _:
                    expected = signature[row.index(max(row))] / sum(abs(x) for x in signature)
            assert logits[b, y].item() == pytest.approx(7 * expected, abs=1e-4)


def test_rows_of_the_paper_give_the_same_order_where_they_are_positive() -> None:
    concepts = ConceptSet(list("abcdef"), embeddings=CONCEPT_TEXTS + 5)
    head, values = make(concepts=concepts, classes=CLASS_TEXTS + 5), 0.2 + 0.05 * torch.rand(50, K)
    assert (head.signatures > 0).all()
    v, t = (rows / rows.sum(1, keepdim=True) for rows in (values, head.signatures))
    official = (v @ t.T) / v.norm(dim=1, keepdim=True) / t.norm(dim=1)
    torch.testing.assert_close(head(output_of(values)), 100 * official, atol=1e-3, rtol=1e-5)


def test_a_negative_sum_does_not_turn_an_image_around() -> None:
    concepts = ConceptSet(["a", "b", "c"], embeddings=torch.eye(3))
    classes = torch.tensor([[0.5, -1.0, -1.0], [-1.0, 0.5, -1.0], [-1.0, -1.0, 0.5], [1.0, 1.0, 1.0]])
    values = torch.tensor([[0.4, -0.6, -0.7], [-0.6, 0.4, -0.7], [-0.6, -0.7, 0.4]])
    assert (values.sum(1) < 0).all()
    for similarity in MEASURES[:2]:
        assert make(similarity, concepts, classes)(output_of(values)).argmax(1).tolist() == [0, 1, 2]
    # an image's largest concept is the largest, whatever the sum; all signatures weigh alike by their sizes
    assert make("max", concepts, classes[:3].repeat(2, 1)[:4])(output_of(values)).argmax(1).tolist() == [0, 1, 2]


def test_a_level_that_all_concepts_share_tells_no_classes_apart() -> None:
    values = 0.1 * torch.randn(40, K)
    raised = output_of(values + 3.0)
    plain, centred = (make(measure)(raised) for measure in ("cosine", "correlation"))
    torch.testing.assert_close(centred, make("correlation")(output_of(values)), atol=1e-2, rtol=1e-3)
    assert len(plain.argmax(1).unique()) == 1
    assert len(centred.argmax(1).unique()) > 1


def test_each_sample_is_compared_in_the_same_way_whatever_came_before() -> None:
    # in the official helper the name of the measure is overwritten, so that all but the first pair are cubed
    head, values = make("cosine"), torch.randn(5, K)
    together = head(output_of(values))
    torch.testing.assert_close(together, torch.cat([head(output_of(row[None])) for row in values]))


def test_small_cosines_keep_their_third_powers() -> None:
    values = torch.randn(4, K)
    head = make("cubed")
    torch.testing.assert_close(head(output_of(1e-15 * values)), head(output_of(values)), atol=1e-3, rtol=1e-4)
    assert head(output_of(torch.zeros(2, K))).tolist() == [[0.0] * L] * 2


@pytest.mark.parametrize("similarity", MEASURES)
@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_contributions_add_up_to_the_logits(similarity: str, task: str) -> None:
    head = make(similarity, classes=CLASS_TEXTS[:2] if task == "binary" else CLASS_TEXTS, task=task)
    output = output_of(torch.randn(7, K))
    account = head.contributions(output)
    assert account.other == {}
    torch.testing.assert_close(account.concepts.sum(-1), head(output), atol=1e-4, rtol=1e-5)
    assert head(output).shape == (7, 1 if task == "binary" else L)


def test_a_binary_logit_says_how_much_nearer_the_second_class_is() -> None:
    two, values = make(classes=CLASS_TEXTS[:2], task="binary"), torch.randn(7, K)
    many = make()(output_of(values))
    torch.testing.assert_close(two(output_of(values))[:, 0], many[:, 1] - many[:, 0])


def test_samples_of_values_and_half_precision() -> None:
    head, values = make(), torch.randn(3, 5, K)
    sampled = output_of(values[0]).replace(values=values, sample_dim=True)
    assert head(sampled).shape == (5, L)
    assert head.contributions(sampled) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(output_of(values[0])), head.classify(values[0], None))
        assert head(output_of(values[0])).dtype == torch.float32


# ---------------------------------------------------------------- where signatures come from


class Spy:
    """A text encoder that turns each text into numbers of its letters, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Any]] = []

    def encode(self, texts: list[str], batch_size: int = 256, templates: Any = None) -> torch.Tensor:
        self.asked.append((list(texts), templates))
        return torch.stack([torch.tensor([float(ord(c)) for c in text[:3].ljust(3)]) for text in texts])


def test_descriptions_are_sentences_and_names_go_into_templates() -> None:
    concepts = ConceptSet(["red", "blue"], texts=["a red bird", "a blue bird"])
    for facts, asked in [
        (ClassFacts(["x", "y"], ["a very red bird", "a blueish one"]), (["a very red bird", "a blueish one"], ["{}"])),
        (ClassFacts(["robin", "jay"]), (["robin", "jay"], None)),
    ]:
        spy = Spy()
        head = ConceptMatrixHead(spy)
        head.introduce(concepts, facts)
        head.build(FeatureDims(3), ValueLayout(2), 2, "multiclass")
        assert spy.asked == [asked, (["a red bird", "a blue bird"], None)]
        assert head._init_args["text_encoder"] is None
        u, v = (torch.nn.functional.normalize(Spy().encode(texts), dim=1) for texts in (asked[0], concepts.texts))
        torch.testing.assert_close(head.signatures, u @ v.T)
    with pytest.raises(ValueError, match="class_names: a text encoder has nothing to encode"):
        ConceptMatrixHead(Spy()).introduce(concepts, ClassFacts())


def test_a_real_encoder_stays_out_of_the_checkpoint(tmp_path: Path) -> None:
    encoder = OpenClipTextEncoder("tiny", templates=["a {}"], model_config=VIT)
    concepts = ConceptSet(["red", "round"])
    names = ["apple", "stone", "plum"]
    bottleneck = SimilarityBottleneck(encoder, standardize=False, scale=1.0)
    made = CBMModule(Identity(16), bottleneck, ConceptMatrixHead(encoder), concepts=concepts, class_names=names)
    torch.testing.assert_close(made.head.signatures, encoder.encode(names) @ encoder.encode(list(concepts)).T)
    assert "head.signatures" in made.state_dict()
    assert not [name for name in made.state_dict() if "transformer" in name]
    trainer = quiet_trainer()
    trainer.strategy.connect(made)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = CBMModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    x = {"embedding": torch.randn(6, 16)}
    torch.testing.assert_close(restored(x).logits, made.eval()(x).logits)
    torch.testing.assert_close(copy.deepcopy(restored)(x).logits, restored(x).logits)


def test_without_texts_the_first_batch_is_refused() -> None:
    head = make(classes=None)
    with pytest.raises(RuntimeError, match="class texts were never encoded"):
        head(output_of(torch.randn(2, K)))
    with pytest.raises(RuntimeError, match="class texts were never encoded"):
        head.contributions(output_of(torch.randn(2, K)))
    head.load_state_dict(make().state_dict())
    values = torch.randn(2, K)
    torch.testing.assert_close(head(output_of(values)), make()(output_of(values)))


@pytest.mark.parametrize(
    ("options", "field"), [({"similarity": "dot"}, "similarity"), ({"scale": 0.0}, "scale"), ({"scale": -1.0}, "scale")]
)
def test_bad_options_name_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        ConceptMatrixHead(**options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class_embeddings: expected \[L, 5\], as wide .* got \[4, 7\]"):
        make(classes=torch.randn(4, 7))
    with pytest.raises(ValueError, match="class_embeddings: expected a row a class, 4 rows, got 3"):
        make(classes=torch.randn(3, D))
    with pytest.raises(ValueError, match="task: ConceptMatrixHead finds the one class"):
        make(task="multilabel")
    for bottleneck in (EmbeddingBottleneck(3), LinearBottleneck(extra_dims=2)):
        with pytest.raises(ValueError, match="head: ConceptMatrixHead reads one similarity a concept"):
            CBMModule(Identity(D), bottleneck, ConceptMatrixHead(), concepts=CONCEPTS, num_classes=L)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("similarity", MEASURES)
def test_a_test_is_all_that_it_takes(data: PrecomputedFeatures, similarity: str) -> None:
    log, made = Log(), model(ConceptMatrixHead(similarity=similarity), data)
    assert not list(made.parameters())
    quiet_trainer(logger=log).test(made, data, verbose=False)
    accuracy = log.rows[-1]["test/label_acc"]
    assert accuracy > (0.5 if similarity == "max" else 0.9)
    table = made.explain({"embedding": CLASS_TEXTS, "label": torch.arange(L)}, top_k=K)
    assert "<bias>" not in set(table["concept"])


def test_training_is_refused_in_words(data: PrecomputedFeatures) -> None:
    with pytest.raises(ValueError, match="no parameters.*test or predict instead"):
        quiet_trainer().fit(model(data=data), data)


def test_corrections_and_concepts_that_are_taken_out(data: PrecomputedFeatures) -> None:
    made = model(data=data).eval()
    prediction = made({"embedding": torch.randn(3, D)})
    none = Intervention(torch.zeros(3, K, dtype=torch.bool), torch.zeros(3, K))
    assert torch.equal(made.intervene(prediction, none).logits, prediction.logits)
    fixed = made.intervene(prediction, {"concept_1": float("nan")})
    values = prediction.concepts.values.clone()
    values[:, 1] = 0.0
    torch.testing.assert_close(fixed.logits, made.head(output_of(values)))
    assert not torch.equal(fixed.logits, prediction.logits)


# ---------------------------------------------------------------- class_embeddings of files


def test_class_embeddings_come_from_the_file(data: PrecomputedFeatures) -> None:
    assert torch.equal(data.class_embeddings, CLASS_TEXTS)
    assert data.num_classes == L


def test_files_without_class_embeddings_have_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", embedding=np.eye(9), label=np.arange(9) % 3, concepts=np.ones((9, 2)))
    assert PrecomputedFeatures(str(tmp_path / "b.npz")).class_embeddings is None


@pytest.mark.parametrize(
    ("texts", "classes", "message"),
    [
        (
            np.ones((3, 5)),
            ["a", "b"],
            r"class_embeddings: expected \[2, D\], a row a class of \['a', 'b'\], got \[3, 5\]",
        ),
        (np.ones(2), None, r"class_embeddings: expected \[2, D\].* got \[2\]"),
        (np.full((2, 5), np.nan), None, "class_embeddings: expected finite numbers"),
        (np.array([["a"], ["b"]]), None, "class_embeddings: expected numbers"),
    ],
)
def test_bad_class_embeddings(tmp_path: Path, texts: Any, classes: Any, message: str) -> None:
    rows = {"embedding": np.eye(8, 5), "label": np.arange(8) % 2, "text_embeddings": np.ones((3, 5))}
    np.savez(tmp_path / "c.npz", **rows, class_embeddings=texts)
    with pytest.raises(ValueError, match=message):
        PrecomputedFeatures(str(tmp_path / "c.npz"), classes=classes)


def test_classes_that_no_sample_has_count_by_their_embeddings(tmp_path: Path) -> None:
    rows = {"embedding": np.eye(8, 5), "label": np.arange(8) % 2, "text_embeddings": np.ones((3, 5))}
    np.savez(tmp_path / "d.npz", **rows, class_embeddings=np.ones((4, 5)))
    assert PrecomputedFeatures(str(tmp_path / "d.npz")).class_names == ["0", "1", "2", "3"]
