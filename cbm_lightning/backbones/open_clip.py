"""`OpenClipBackbone`: the image tower of any open_clip model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cbm_lightning.backbones.base import Backbone, ImageStats, Transform, probe
from cbm_lightning.backbones.clip import ModelConfig, canonical_name, clip_config, make_clip, make_visual
from cbm_lightning.backbones.towers import make_tower
from cbm_lightning.types import Features


class OpenClipBackbone(Backbone):
    """The image tower of an open_clip model; the text tower is not kept.

    The pooled vector is the image embedding in the space that images and texts share (not normalised).

    Args:
        name: Name in open_clip: ``ViT-B-32``, ``RN50``, ``ViT-B-16-SigLIP``.
        pretrained: Tag of weights to download (``openai``, ``laion2b_s34b_b79k``, ``webli``); None for random weights.
        checkpoint_path: Local weights of the whole model instead (``.safetensors`` or a torch file).
        frozen: Never train: no gradients, evaluation mode always.
        freeze_norm: Train, but keep BatchNorm layers in evaluation mode with fixed statistics.
        img_size: Side of the input in pixels; the configured one by default.
        pool: The pooled vector: ``native`` is the image embedding, ``token_mean`` the mean of the tokens, which exact
            concept maps need.
        tokens: ``patch`` gives the tokens of the last layer in the tower's own width; ``projected`` embeds each token
            in the shared space, by the tower's own pooling of that token alone, to be compared with texts.
        preprocess: How pixels are prepared, in place of what goes with the weights: ``mean``, ``std``,
            ``interpolation``, ``resize_mode`` (``shortest``, ``longest`` or ``squash``), ``fill_color``. Needed with
            ``checkpoint_path`` where the weights do not expect OpenAI's.
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` as in open_clip's own configurations, or the path
            of a JSON file of them, in place of the registered one of that name.

    Attributes:
        tower: The image tower.
        img_size: Height and width of the input in pixels.

    Raises:
        ValueError: The name or tag is unknown (near matches are listed), or the weights do not fit.
        FileNotFoundError: There is no file at ``checkpoint_path`` or ``model_config``.

    Example:
        >>> tiny = {
        ...     "embed_dim": 16,
        ...     "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        ...     "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        ... }
        >>> OpenClipBackbone("tiny", model_config=tiny).dims
        FeatureDims(pooled=16, tokens=32, grid=(4, 4))
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        checkpoint_path: str | None = None,
        *,
        frozen: bool = False,
        freeze_norm: bool = False,
        img_size: int | None = None,
        pool: Literal["native", "token_mean"] = "native",
        tokens: Literal["patch", "projected"] = "patch",
        preprocess: dict[str, Any] | None = None,
        model_config: ModelConfig | None = None,
    ) -> None:
        super().__init__(frozen=frozen, freeze_norm=freeze_norm)
        self.name = canonical_name(name, pretrained)
        self._config = None if model_config is None else clip_config(self.name, model_config)
        self.pool = pool
        self.tokens = tokens
        if pretrained is None and checkpoint_path is None:
            visual = make_visual(self.name, self._config, img_size)
        else:
            visual = make_clip(self.name, pretrained, checkpoint_path, self._config, img_size).visual
        size = visual.image_size
        self.img_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.preprocess = _preprocess(getattr(visual, "preprocess_cfg", {}), preprocess or {})
        self.tower = make_tower(visual)
        example = torch.zeros(1, 3, *self.img_size)
        self.dims = probe(self.encode, self, example)
        if pool == "token_mean" and not frozen:
            self.freeze_unused(example)
        self.freeze()

    def encode(self, x: Tensor) -> Features:
        """Features of images ``[B, 3, H, W]``."""
        pooled, tokens, grid = self.tower(x)
        if tokens is not None and self.tokens == "projected":
            tokens = self.tower.project(tokens)
        if self.pool == "native":
            return Features(pooled, tokens, grid=grid)
        if tokens is None:
            raise ValueError(f"pool: 'token_mean' needs patch tokens, but {self.name} has none; use pool='native'")
        return Features(tokens.mean(1), tokens, grid=grid)

    def eval_transform(self) -> Transform:
        """The weights' own preprocessing of a PIL image."""
        return self._transform(training=False)

    def train_transform(self) -> Transform:
        """Augmentation by open_clip of a PIL image: a random resized crop of at least nine tenths of it."""
        return self._transform(training=True)

    def image_stats(self) -> ImageStats:
        """Pixel mean and standard deviation that the weights expect."""
        return ImageStats(tuple(self.preprocess["mean"]), tuple(self.preprocess["std"]))

    def portable_init_args(self) -> dict[str, Any]:
        """The same tower without a source of weights; configuration and wanted pixels are written out."""
        sources = {"pretrained": None, "checkpoint_path": None, "model_config": self._config}
        return {**super().portable_init_args(), **sources, "name": self.name, "preprocess": self.preprocess}

    def _transform(self, training: bool) -> Transform:
        import open_clip

        transform: Transform = open_clip.image_transform(self.img_size, is_train=training, **self.preprocess)
        return transform


def _preprocess(of_weights: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of open_clip, what goes with the weights, and what is given, the later over the earlier."""
    import open_clip

    defaults = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(f"preprocess: unknown {unknown}; it takes {sorted(defaults)}")
    merged = {**defaults, **{key: value for key, value in of_weights.items() if key in defaults}, **given}
    for field in ("mean", "std"):
        merged[field] = tuple(merged[field])
        if len(merged[field]) != 3:
            raise ValueError(f"preprocess: {field} needs three numbers, got {list(merged[field])}")
    return merged
