"""`OpenClipTextEncoder`: concept texts as vectors in the space of the images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.backbones.clip import ModelConfig, canonical_name, clip_config, make_clip, word_tokenizer
from cbm_lightning.backbones.tokenizer import WordTokenizer
from cbm_lightning.configurable import Part


class OpenClipTextEncoder(Part):
    """The text tower of an open_clip model, with prompt templates. It never trains.

    Args:
        name: Name in open_clip, the same as of the image tower.
        pretrained: Tag of weights to download, the same as of the image tower; None for random weights.
        checkpoint_path: Local weights of the whole model instead (``.safetensors`` or a torch file).
        templates: Sentences with ``{}`` where the text goes. The embeddings of all templates are averaged.
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` as in open_clip's own configurations, or the path
            of a JSON file of them, in place of the registered one of that name. With a ``vocabulary``, a list of words,
            in ``text_cfg``, the tokens are these words (`WordTokenizer`), and others are left out with a warning.

    Raises:
        ValueError: The name or tag is unknown (near matches are listed), the weights do not fit, there is no template,
            or one has no ``{}``.
        FileNotFoundError: There is no file at ``checkpoint_path`` or ``model_config``.

    Example:
        >>> tiny = {
        ...     "embed_dim": 16,
        ...     "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        ...     "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        ... }
        >>> OpenClipTextEncoder("tiny", model_config=tiny).encode(["red wings", "a hooked bill"]).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        checkpoint_path: str | None = None,
        templates: Sequence[str] = ("a photo of {}.",),
        model_config: ModelConfig | None = None,
    ) -> None:
        super().__init__()
        if isinstance(templates, str) or not templates:
            raise ValueError(f"templates: expected a list of at least one sentence with '{{}}', got {templates!r}")
        if lacking := [template for template in templates if "{}" not in template]:
            raise ValueError(f"templates: each needs '{{}}' where the text goes, missing in {lacking}")
        self.name = canonical_name(name, pretrained)
        self.templates = list(templates)
        self._registered = model_config is None
        config = clip_config(self.name, model_config)
        self._text_config: dict[str, Any] = config["text_cfg"]
        self._config = None if self._registered else config
        self.model = make_clip(self.name, pretrained, checkpoint_path, self._config)
        self.model.visual = nn.Identity()
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256, templates: Sequence[str] | None = None) -> Tensor:
        """Embed texts, averaged over the templates (Radford et al., CLIP, 2021, section 3.1.4).

        Args:
            texts: ``K`` texts.
            batch_size: Sentences encoded at once.
            templates: In place of the encoder's own; ``["{}"]`` for texts that are sentences themselves.

        Returns:
            ``[K, D]`` vectors of length 1.

        Raises:
            ValueError: There are no texts.
            OSError: The model needs a tokenizer whose files are not here.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts: expected a list of at least one text, got {texts!r}")
        templates = self.templates if templates is None else templates
        sentences = [template.replace("{}", text) for text in texts for template in templates]
        tokenize = make_tokenizer(self.name, self._text_config, self._registered)
        tokens = tokenize(sentences).to(next(self.model.parameters()).device)
        chunks = [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
        encoded = torch.cat([self.model.encode_text(chunk, normalize=True) for chunk in chunks])
        mean = encoded.reshape(len(texts), len(templates), -1).mean(1)
        return nn.functional.normalize(mean, dim=-1)

    def train(self, mode: bool = True) -> OpenClipTextEncoder:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def portable_init_args(self) -> dict[str, Any]:
        """The same tower without a source of weights, nor a file for its configuration."""
        sources = {"pretrained": None, "checkpoint_path": None, "model_config": self._config}
        return {**super().portable_init_args(), **sources, "name": self.name}


def make_tokenizer(name: str, text_config: Mapping[str, Any], registered: bool) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model: texts to token numbers ``[N, context_length]``.

    Args:
        name: Name in open_clip, or of the configuration for messages.
        text_config: Its ``text_cfg``.
        registered: Whether open_clip knows the name.

    Raises:
        OSError: The model needs a tokenizer whose files are not here.
        ValueError: The ``vocabulary`` of the configuration is none.
    """
    import open_clip

    if (words := word_tokenizer(text_config)) is not None:
        return _warning_of_unknown(words)
    hub_name = text_config.get("hf_tokenizer_name")
    length = text_config.get("context_length", 77)
    if not registered and hub_name is None:
        simple: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length)
        return simple
    try:
        if registered:
            found: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        else:
            options = text_config.get("tokenizer_kwargs") or {}
            found = open_clip.tokenizer.HFTokenizer(hub_name, context_length=length, **options)
    # a missing library, a missing file and a missing network each raise their own
    except Exception as error:
        raise OSError(
            f"the tokenizer of {name} ({hub_name or 'SigLIP'}) cannot be made: it needs the transformers "
            f"library and files from the Hugging Face hub ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return found


def _warning_of_unknown(tokenizer: WordTokenizer) -> Callable[[list[str]], Tensor]:
    def tokens(sentences: list[str]) -> Tensor:
        if (unknown := tokenizer.describe_unknown(sentences)) is not None:
            warnings.warn(f"{unknown}; these words say nothing to the text encoder", stacklevel=5)
        return tokenizer(sentences)

    return tokens
