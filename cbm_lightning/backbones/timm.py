"""`TimmBackbone`: any image model of timm."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cbm_lightning.backbones.base import Backbone, ImageStats, Transform, probe, split_map
from cbm_lightning.backbones.layout import TokenLayout
from cbm_lightning.backbones.weights import load_timm_weights
from cbm_lightning.modes import evaluating
from cbm_lightning.types import Features


class TimmBackbone(Backbone):
    """Any image model of timm, with its pooled vector, its patch tokens and its own transforms.

    Args:
        name: Name in timm, with or without the tag of weights: ``resnet18``, ``vit_base_patch16_224.augreg_in21k``.
        pretrained: Download the weights that timm knows under that name.
        checkpoint_path: Local weights instead (``.safetensors`` or a torch file); their classifier is dropped.
        frozen: Never train: no gradients, evaluation mode always.
        freeze_norm: Train, but keep BatchNorm layers in evaluation mode with fixed statistics.
        img_size: Side of the input in pixels, for the transforms and for models with a fixed input size. The size the
            weights were trained at by default.
        output_stride: Pixels a cell of the last feature map, for convolutional models that can dilate (8, 16 or 32): a
            finer grid from the same weights.
        stage: Take the tokens from this intermediate stage, counted as in timm's ``features_only`` (0 is the first):
            a finer grid from any model. They come as the stage leaves them, without a final norm.
        pool: The pooled vector: ``native`` is the model's own, of its last stage whatever the stage of the tokens;
            ``token_mean`` is the mean of the tokens, which exact concept maps need.
        mean: Pixel mean that the weights expect, a number a channel; timm's for these weights by default.
        std: Pixel standard deviation, likewise.
        crop_pct: Share of the side that the centre crop of `eval_transform` keeps, in (0, 1]; 1 cuts nothing off a
            square image. The weights' own by default.
        model_args: Further arguments for ``timm.create_model`` (``pad_type``, ``drop_path_rate``, ...).

    Attributes:
        model: The timm model.
        img_size: Side of the input in pixels.

    Raises:
        ValueError: The name is unknown (near matches are listed), the model refuses an option, the weights do not fit.
        FileNotFoundError: There is no file at ``checkpoint_path``.

    Example:
        >>> backbone = TimmBackbone("test_resnet", img_size=64, output_stride=8)
        >>> backbone.dims
        FeatureDims(pooled=96, tokens=96, grid=(8, 8))
        >>> backbone(torch.zeros(2, 3, 64, 64)).tokens.shape
        torch.Size([2, 64, 96])
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        *,
        frozen: bool = False,
        freeze_norm: bool = False,
        img_size: int | None = None,
        output_stride: int | None = None,
        stage: int | None = None,
        pool: Literal["native", "token_mean"] = "native",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(frozen=frozen, freeze_norm=freeze_norm)
        if pretrained and checkpoint_path is not None:
            raise ValueError("pretrained and checkpoint_path: both name weights; give one of them")
        self.name = name
        self.stage = stage
        self.pool = pool
        self.model = _create(name, pretrained, img_size, output_stride, model_args or {})
        channels = (model_args or {}).get("in_chans", self.model.pretrained_cfg["input_size"][0])
        self._data = _data_config(self.model.pretrained_cfg, channels, img_size, mean, std, crop_pct)
        self.img_size: int = self._data["input_size"][-1]
        if checkpoint_path is not None:
            load_timm_weights(self.model, checkpoint_path)
        self._check_stage()
        example = torch.zeros(1, *self._data["input_size"])
        self._layout = self._find_layout(example)
        self.dims = probe(self.encode, self, example)
        self._check_output_stride(output_stride)
        if pool == "token_mean" and not frozen:
            self.freeze_unused(example)
        self.freeze()

    def encode(self, x: Tensor) -> Features:
        """Features of images ``[B, C, H, W]``; the grid follows from the size of the input."""
        if self.stage is None:
            output = self.model.forward_features(x)
            tokens, grid = self._layout.read(output, x.shape[-2], x.shape[-1])
        else:
            whole = self.pool == "native"
            result = self.model.forward_intermediates(
                x, indices=[self.stage], norm=False, stop_early=not whole, intermediates_only=not whole
            )
            output, maps = result if whole else (None, result)
            tokens, grid = split_map(maps[0])
        if self.pool == "native":
            return Features(self.model.forward_head(output, pre_logits=True), tokens, grid=grid)
        if tokens is None:
            raise ValueError(
                f"pool: 'token_mean' needs patch tokens, but the last stage of {self.name} has none; choose a stage or "
                "pool='native'"
            )
        return Features(tokens.mean(1), tokens, grid=grid)

    def eval_transform(self) -> Transform:
        """The weights' own preprocessing of a PIL image: resize, centre crop, normalise."""
        from timm.data.transforms_factory import create_transform

        transform: Transform = create_transform(**self._data, is_training=False)
        return transform

    def train_transform(self) -> Transform:
        """Augmentation by timm of a PIL image: random resized crop, flip, colour jitter, normalise."""
        from timm.data.transforms_factory import create_transform

        transform: Transform = create_transform(**self._data, is_training=True)
        return transform

    def image_stats(self) -> ImageStats:
        """Pixel mean and standard deviation that the weights expect."""
        return ImageStats(tuple(self._data["mean"]), tuple(self._data["std"]))

    def portable_init_args(self) -> dict[str, Any]:
        """The same model without a source of weights; the pixel statistics of the weights are written out."""
        stats = self.image_stats()
        sources = {"pretrained": False, "checkpoint_path": None}
        return {**super().portable_init_args(), **sources, "mean": list(stats.mean), "std": list(stats.std)}

    def _check_stage(self) -> None:
        if self.stage is None:
            return
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"stage: {self.name} gives no intermediate stages; leave it out")
        count = len(self.model.feature_info)
        if not 0 <= self.stage < count:
            raise ValueError(f"stage: {self.name} has stages 0 to {count - 1}, got {self.stage}")

    def _find_layout(self, example: Tensor) -> TokenLayout:
        if self.stage is not None:
            return TokenLayout(rank=4)
        with evaluating(self), torch.no_grad():
            output = self.model.forward_features(example)
        return TokenLayout.of(self.model, output, example.shape[-2], example.shape[-1])

    def _check_output_stride(self, output_stride: int | None) -> None:
        if output_stride is None or self.stage is not None or self.dims.grid is None:
            return
        expected = math.ceil(self.img_size / output_stride)
        if self.dims.grid[-1] != expected:
            raise ValueError(
                f"output_stride: {self.name} ignores it (a grid {self.dims.grid} at {self.img_size} pixels, not "
                f"{(expected, expected)}); choose a stage for a finer grid"
            )


def _create(
    name: str, pretrained: bool, img_size: int | None, output_stride: int | None, model_args: dict[str, Any]
) -> Any:
    """Make the timm model without a classifier.

    Raises:
        ValueError: The name is unknown, or the model refuses an option.
    """
    import timm

    _check_name(name)
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size: expected a number of pixels, got {img_size}")
    if taken := sorted({"num_classes", "features_only", "img_size", "output_stride"} & set(model_args)):
        raise ValueError(
            f"model_args: {taken} cannot be set there: sizes are arguments of TimmBackbone, the rest is fixed"
        )
    options = dict(model_args)
    cfg = timm.models.get_pretrained_cfg(name)
    if img_size is not None and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = img_size
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name} refuses an option of {options}: {str(error) or 'not supported'}") from error


def _data_config(
    cfg: dict[str, Any],
    channels: int,
    img_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop_pct: float | None,
) -> dict[str, Any]:
    """What ``timm.data.create_transform`` needs: the weights' own configuration, with what is given in its place."""
    config = {key: cfg[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    config["input_size"] = (channels, *((img_size, img_size) if img_size else config["input_size"][1:]))
    for field, given in (("mean", mean), ("std", std)):
        config[field] = tuple(config[field] if given is None else given)
        if len(config[field]) != channels:
            raise ValueError(f"{field}: expected a number a channel ({channels}), got {list(config[field])}")
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct: expected a share in (0, 1], got {crop_pct}")
        config["crop_pct"] = crop_pct
    return config


def _check_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {near}?" if near else "timm.list_models() lists all"
        raise ValueError(f"name: timm has no model {name!r}; {hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"name: timm has no weights {tag!r} of {architecture}; it has {tags}")
