"""WordTokenizer, and model configurations that bring their own vocabulary or lie in a file."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from tiny_clip import VIT

from cbm_lightning.backbones import OpenClipBackbone, OpenClipTextEncoder
from cbm_lightning.backbones.clip import clip_config
from cbm_lightning.backbones.tokenizer import WordTokenizer, vocabulary_of
from cbm_lightning.configurable import build

WORDS = ["a", "bird", "red", "tail", "wing", "with"]
CONFIG = {**VIT, "text_cfg": {**VIT["text_cfg"], "context_length": 8, "vocabulary": WORDS}}


def test_sentences_have_start_end_and_padding() -> None:
    tokens = WordTokenizer(WORDS, 8)(["A bird with a RED wing!", "tail", ""])
    assert tokens.tolist() == [[1, 2, 3, 7, 2, 4, 6, 8], [1, 5, 8, 0, 0, 0, 0, 0], [1, 8, 0, 0, 0, 0, 0, 0]]
    assert tokens.dtype == torch.long


def test_long_sentences_keep_their_end() -> None:
    tokenizer = WordTokenizer(WORDS, 5)
    assert tokenizer(["a bird with a red wing"]).tolist() == [[1, 2, 3, 7, 8]]
    # clip reads the text off the largest token
    assert tokenizer(["a bird with a red wing", "wing"]).argmax(1).tolist() == [4, 2]


def test_unknown_words_are_left_out_and_named() -> None:
    tokenizer = WordTokenizer(WORDS, 8)
    assert tokenizer(["a photo of a red bird"]).tolist() == tokenizer(["a a red bird"]).tolist()
    assert tokenizer.unknown(["a photo of a wing", "photo"]) == ["of", "photo"]
    assert tokenizer.describe_unknown(["a red wing"]) is None
    assert "lacks ['wings'] (near 'wings': ['wing'])" in tokenizer.describe_unknown(["red wings"])
    many = tokenizer.describe_unknown([" ".join(f"x{i}" for i in range(9))])
    assert many.endswith("'x4'] and 4 more")


def test_the_vocabulary_of_texts() -> None:
    assert vocabulary_of(["Red, red wing-bar", "don't über_2"]) == ["2", "bar", "don", "red", "t", "wing", "über"]


@pytest.mark.parametrize(
    ("vocabulary", "length", "message"),
    [
        ([], 8, "vocabulary: expected a list"),
        ("red", 8, "vocabulary: expected a list"),
        (["red", "eye ring"], 8, r"vocabulary: expected single words .* \['eye ring'\]"),
        (["Red"], 8, "lower case, got"),
        ([True], 8, "single words"),
        (["red", "red", "a"], 8, r"repeated are \['red'\]"),
        (["red"], 2, "context_length: expected at least 3"),
    ],
)
def test_bad_vocabularies(vocabulary: list[str], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordTokenizer(vocabulary, length)


def test_the_vocabulary_sets_the_size_of_the_text_tower() -> None:
    encoder = OpenClipTextEncoder("tiny", templates=["a {}"], model_config=CONFIG)
    assert encoder.model.token_embedding.weight.shape == (9, 16)
    assert "vocab_size" not in CONFIG["text_cfg"]
    expected = encoder.model.encode_text(WordTokenizer(WORDS, 8)(["a red tail"]), normalize=True)
    torch.testing.assert_close(encoder.encode(["red tail"]), expected)


def test_a_text_encoder_warns_of_words_that_it_does_not_know() -> None:
    encoder = OpenClipTextEncoder("tiny", model_config=CONFIG)
    with pytest.warns(UserWarning, match=r"lacks \['of', 'photo'\]; these words say nothing"):
        encoder.encode(["red"])


def test_sentences_need_no_template() -> None:
    encoder = OpenClipTextEncoder("tiny", templates=["a bird with {}"], model_config=CONFIG)
    torch.testing.assert_close(encoder.encode(["a bird with a tail"], templates=["{}"]), encoder.encode(["a tail"]))


def test_a_configuration_in_a_file_becomes_part_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    encoder, backbone = (kind("tiny", model_config=str(path)) for kind in (OpenClipTextEncoder, OpenClipBackbone))
    path.unlink()
    expected, pixels = encoder.encode(["wing"], templates=["{}"]), torch.rand(2, 3, 32, 32)
    restored = build(encoder.spec())
    restored.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(restored.encode(["wing"], templates=["{}"]), expected)
    again = build(backbone.spec())
    again.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(again.eval()(pixels).pooled, backbone.eval()(pixels).pooled)


def test_registered_configurations_are_untouched() -> None:
    assert clip_config("ViT-B-32") == dict(open_clip.get_model_config("ViT-B-32"))


def test_bad_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    with pytest.raises(FileNotFoundError, match=rf"model_config: no file at {missing}; ContrastiveModule writes one"):
        OpenClipBackbone("tiny", model_config=str(missing))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_config: .*a.json is no JSON"):
        clip_config("tiny", str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_config: expected a mapping in .*b.json, got list"):
        clip_config("tiny", str(tmp_path / "b.json"))
