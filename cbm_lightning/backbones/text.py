"""`OpenClipTextEncoder`: concept texts as vectors in the space of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.backbones.clip import canonical_name, clip_config, make_clip
from cbm_lightning.configurable import Part


class OpenClipTextEncoder(Part):
    """The text tower of an open_clip model, with prompt templates. It never trains.

    Args:
        name: Name in open_clip, the same as of the image tower.
        pretrained: Tag of weights to download, the same as of the image tower; None for random weights.
        checkpoint_path: Local weights of the whole model instead (``.safetensors`` or a torch file).
        templates: Sentences with ``{}`` where the text goes. The embeddings of all templates are averaged.
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` as in open_clip's own configurations, in place of
            the registered one of that name.

    Raises:
        ValueError: The name or tag is unknown (near matches are listed), the weights do not fit, there is no template,
            or one has no ``{}``.
        FileNotFoundError: There is no file at ``checkpoint_path``.

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
        model_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(templates, str) or not templates:
            raise ValueError(f"templates: expected a list of at least one sentence with '{{}}', got {templates!r}")
        if lacking := [template for template in templates if "{}" not in template]:
            raise ValueError(f"templates: each needs '{{}}' where the text goes, missing in {lacking}")
        self.name = canonical_name(name, pretrained)
        self.templates = list(templates)
        self._registered = model_config is None
        self._text_config: dict[str, Any] = clip_config(self.name, model_config)["text_cfg"]
        self.model = make_clip(self.name, pretrained, checkpoint_path, model_config)
        self.model.visual = nn.Identity()
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts, averaged over the templates (Radford et al., CLIP, 2021, section 3.1.4).

        Args:
            texts: ``K`` texts.
            batch_size: Sentences encoded at once.

        Returns:
            ``[K, D]`` vectors of length 1.

        Raises:
            ValueError: There are no texts.
            OSError: The model needs a tokenizer whose files are not here.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts: expected a list of at least one text, got {texts!r}")
        sentences = [template.replace("{}", text) for text in texts for template in self.templates]
        tokens = self._tokenizer()(sentences).to(next(self.model.parameters()).device)
        chunks = [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
        encoded = torch.cat([self.model.encode_text(chunk, normalize=True) for chunk in chunks])
        mean = encoded.reshape(len(texts), len(self.templates), -1).mean(1)
        return nn.functional.normalize(mean, dim=-1)

    def train(self, mode: bool = True) -> OpenClipTextEncoder:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def portable_init_args(self) -> dict[str, Any]:
        """The same tower without a source of weights."""
        return {**super().portable_init_args(), "name": self.name, "pretrained": None, "checkpoint_path": None}

    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        import open_clip

        hub_name = self._text_config.get("hf_tokenizer_name")
        length = self._text_config.get("context_length", 77)
        if not self._registered and hub_name is None:
            simple: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length)
            return simple
        try:
            if self._registered:
                found: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(self.name)
            else:
                options = self._text_config.get("tokenizer_kwargs") or {}
                found = open_clip.tokenizer.HFTokenizer(hub_name, context_length=length, **options)
        # a missing library, a missing file and a missing network each raise their own
        except Exception as error:
            raise OSError(
                f"the tokenizer of {self.name} ({hub_name or 'SigLIP'}) cannot be made: it needs the transformers "
                f"library and files from the Hugging Face hub ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        return found
