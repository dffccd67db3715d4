"""Making open_clip models from registered names or from plain configurations, and loading their weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from cbm_lightning.backbones.tokenizer import WordTokenizer
from cbm_lightning.backbones.weights import describe_misfit, existing_file, read_weights

ModelConfig = dict[str, Any] | str
"""``embed_dim``, ``vision_cfg`` and ``text_cfg`` as in open_clip's own configurations, or the path of a JSON file of
them. ``text_cfg`` may hold a ``vocabulary``, a list of words: texts are read by `WordTokenizer` then."""


def make_clip(
    name: str,
    pretrained: str | None = None,
    checkpoint_path: str | None = None,
    model_config: ModelConfig | None = None,
    img_size: int | None = None,
) -> Any:
    """A whole open_clip model, image and text tower.

    Args:
        name: Registered name.
        pretrained: Tag of weights to download.
        checkpoint_path: Local weights of a whole model instead.
        model_config: See `ModelConfig`, in place of the registered one.
        img_size: Side of the input in pixels, in place of the configured one.

    Raises:
        ValueError: The name or tag is unknown (near matches are listed), two sources of weights are named, the
            configuration is not one of open_clip, or the weights do not fit.
        FileNotFoundError: There is no file at ``checkpoint_path`` or ``model_config``.
    """
    import open_clip

    if pretrained is not None:
        if checkpoint_path is not None or model_config is not None:
            raise ValueError(
                "pretrained names registered weights of a registered model; give no checkpoint_path or model_config"
            )
        return open_clip.create_model(name, pretrained=pretrained, force_image_size=img_size)
    config = clip_config(name, model_config)
    text = config["text_cfg"]
    text["hf_model_pretrained"] = False
    text.pop("vocabulary", None)
    custom = config.pop("custom_text", False) or text.get("hf_model_name") is not None
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = _assemble(open_clip.CoCa if "multimodal_cfg" in config else kind, config, img_size)
    if checkpoint_path is not None:
        _load(model, checkpoint_path, name)
    _resize(model.visual, img_size)
    return model


def make_visual(name: str, model_config: ModelConfig | None = None, img_size: int | None = None) -> Any:
    """The image tower alone, without weights: nothing is downloaded, and no text tower is made.

    Raises:
        ValueError: The name is unknown (near matches are listed), or the configuration is not one of open_clip.
    """
    import open_clip

    config = clip_config(name, model_config)
    parts: dict[str, Any] = {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}
    # the public class makes both towers; the text tower is thrown away, so it may as well be tiny
    parts["text_cfg"] = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
    visual = _assemble(open_clip.CLIP, parts, img_size).visual
    _resize(visual, img_size)
    return visual


def clip_config(name: str, model_config: ModelConfig | None = None) -> dict[str, Any]:
    """A copy of the configuration of a registered model, or of the one given, with the size of its own vocabulary.

    Raises:
        FileNotFoundError: There is no file of that name.
        ValueError: The name is unknown (near matches are listed), the file is no configuration, or a part of the
            configuration is missing.
    """
    import open_clip

    if model_config is not None:
        if isinstance(model_config, str):
            model_config = read_config(model_config)
        if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_config]:
            raise ValueError(f"model_config: {missing} missing; it is laid out like open_clip.get_model_config(name)")
        config = deepcopy(dict(model_config))
        if (tokenizer := word_tokenizer(config["text_cfg"])) is not None:
            config["text_cfg"]["vocab_size"] = tokenizer.size
        return config
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {near}?" if near else "open_clip.list_models() lists all"
        raise ValueError(f"name: open_clip has no model {name!r}; {hint}")
    return deepcopy(dict(open_clip.get_model_config(name)))


def read_config(path: str) -> dict[str, Any]:
    """The configuration in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"model_config: no file at {file}; ContrastiveModule writes one beside its weights when its training ends "
            "(cbm fit --config tiny_clip), or give the configuration itself"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model_config: {file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model_config: expected a mapping in {file}, got {type(config).__name__}")
    return config


def word_tokenizer(text_config: Mapping[str, Any]) -> WordTokenizer | None:
    """The tokenizer of a ``text_cfg`` that brings its own vocabulary, None for one that does not."""
    vocabulary = text_config.get("vocabulary")
    return None if vocabulary is None else WordTokenizer(vocabulary, text_config.get("context_length", 77))


def canonical_name(name: str, pretrained: str | None) -> str:
    """The registered name whose structure fits the weights of a tag.

    Some weights (OpenAI's, MetaCLIP's) were trained with an approximate GELU. open_clip keeps a second configuration
    for them, and with the first one the same weights give worse features.

    Raises:
        ValueError: There is no such tag for this model; those there are, are listed.
    """
    import open_clip

    name = name.replace("/", "-")
    if pretrained is None:
        return name
    config = clip_config(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise ValueError(
            f"pretrained: open_clip has no weights {pretrained!r} of {name}; it has {tags}. Local weights go to "
            "checkpoint_path"
        )
    twin = f"{name}-quickgelu"
    wants_quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    return twin if wants_quick and not config.get("quick_gelu") and twin in open_clip.list_models() else name


def _assemble(kind: Any, config: dict[str, Any], img_size: int | None) -> Any:
    vision = config["vision_cfg"]
    if img_size is not None:
        vision["image_size"] = img_size
    # weights come later, from a named source only
    vision["timm_model_pretrained"] = False
    try:
        return kind(**config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model_config: open_clip refuses {config}: {error}") from error


def _load(model: Any, checkpoint_path: str, name: str) -> None:
    import open_clip

    file = existing_file(checkpoint_path)
    try:
        keys = open_clip.load_checkpoint(model, str(file), strict=False)
        misfit = describe_misfit(keys.missing_keys, keys.unexpected_keys)
    # open_clip fails in many ways on a file that it does not know; which of ours it is shows on reading it
    except Exception as error:
        read_weights(file)
        misfit = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if misfit:
        raise ValueError(f"checkpoint_path: {file} does not fit {name}: {misfit}; check the name or model_config")


def _resize(visual: Any, img_size: int | None) -> None:
    # native towers are made at their size; a timm tower is made at timm's, whatever image_size says
    if img_size is not None and hasattr(visual, "set_input_size"):
        visual.set_input_size(img_size)
