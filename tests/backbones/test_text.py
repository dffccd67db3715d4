"""OpenClipTextEncoder: templates, batches, weights and tokenizers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import SIGLIP, VIT
from torch.nn.functional import normalize

from cbm_lightning.backbones.clip import make_clip
from cbm_lightning.backbones.text import OpenClipTextEncoder
from cbm_lightning.configurable import build

TEXTS = ["red wings", "a hooked bill", "white eye ring", "long tail", "black crown"]


@pytest.mark.parametrize("config", [VIT, SIGLIP])
def test_average_of_normalised_templates(config: dict[str, object], tmp_path: Path) -> None:
    import open_clip

    whole = make_clip("tiny", model_config=config).eval()
    path = tmp_path / "clip.safetensors"
    save_file(whole.state_dict(), path)
    templates = ["a photo of {}.", "{} of a bird"]
    encoder = OpenClipTextEncoder("tiny", checkpoint_path=str(path), templates=templates, model_config=config)
    encoded = encoder.encode(TEXTS)
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    each = [whole.encode_text(tokenizer([t.format(text) for text in TEXTS]), normalize=True) for t in templates]
    torch.testing.assert_close(encoded, normalize(each[0] + each[1], dim=-1))
    assert encoded.shape == (5, config["embed_dim"])
    torch.testing.assert_close(encoded.norm(dim=-1), torch.ones(5))
    assert not encoded.requires_grad


def test_batches_do_not_matter() -> None:
    encoder = OpenClipTextEncoder("tiny", templates=["{}", "a {}", "the {}"], model_config=VIT)
    torch.testing.assert_close(encoder.encode(TEXTS, batch_size=2), encoder.encode(TEXTS))
    torch.testing.assert_close(encoder.encode(TEXTS[2:3])[0], encoder.encode(TEXTS)[2])


def test_never_trains() -> None:
    encoder = OpenClipTextEncoder("tiny", model_config=VIT).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any("visual" in name for name in encoder.state_dict())


def test_spec_and_copies() -> None:
    encoder = OpenClipTextEncoder("tiny", templates=["a {}"], model_config=VIT)
    expected = encoder.encode(TEXTS)
    torch.testing.assert_close(copy.deepcopy(encoder).encode(TEXTS), expected)
    restored = build(encoder.spec())
    restored.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(restored.encode(TEXTS), expected)


def test_braces_in_texts_are_kept() -> None:
    encoder = OpenClipTextEncoder("tiny", model_config=VIT)
    assert encoder.encode(["{red}"]).shape == (1, 16)


def test_tokenizers_from_the_hub_need_files() -> None:
    config = {**VIT, "text_cfg": {**VIT["text_cfg"], "hf_tokenizer_name": "nobody/nothing-of-that-name"}}
    encoder = OpenClipTextEncoder("tiny", model_config=config)
    with pytest.raises(OSError, match=r"tokenizer of tiny \(nobody/nothing.*Hugging Face hub"):
        encoder.encode(TEXTS)


@pytest.mark.parametrize("templates", [[], "a photo of {}", ["a photo of"]])
def test_bad_templates(templates: list[str]) -> None:
    with pytest.raises(ValueError, match="templates"):
        OpenClipTextEncoder("tiny", templates=templates, model_config=VIT)


@pytest.mark.parametrize("texts", [[], "red wings"])
def test_bad_texts(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="texts: expected a list"):
        OpenClipTextEncoder("tiny", model_config=VIT).encode(texts)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        OpenClipTextEncoder("ViT-B-23")
