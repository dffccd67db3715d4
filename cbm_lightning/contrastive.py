"""`ContrastiveModule`: trains a CLIP of one's own, whose two towers then serve as backbone and text encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics.classification import MulticlassAccuracy

from cbm_lightning.backbones import OpenClipBackbone
from cbm_lightning.backbones.clip import ModelConfig, clip_config, make_clip, word_tokenizer
from cbm_lightning.backbones.text import make_tokenizer
from cbm_lightning.batches import read_batch
from cbm_lightning.optimization import (
    ClassSpec,
    check_optimizer,
    check_positive,
    check_scheduler,
    make_optimizer,
    make_scheduler,
)
from cbm_lightning.types import Batch

WEIGHTS, CONFIG = "model.safetensors", "model_config.json"


class ContrastiveModule(LightningModule):
    """An open_clip model of any size, trained on images and captions (Radford et al., CLIP, 2021, section 2.3).

    The loss is the symmetric cross-entropy of open_clip's own ``ClipLoss``: within a batch, each image is to find its
    caption and each caption its image. Batches are dicts with ``image [B,3,H,W]`` and ``caption``, a list of ``B``
    sentences. Where there are ``label [B]`` and a sentence a class, validation and test log ``label_acc``, the accuracy
    of the class whose sentence lies nearest: no label is ever trained on. The sentences are ``class_descriptions`` of
    the datamodule that is validated or tested on, so a model can be tested on classes that it never saw.

    Args:
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` as in open_clip's own configurations, or a JSON
            file of them. With a ``vocabulary``, a list of words, in ``text_cfg``, captions are read by `WordTokenizer`,
            and training refuses captions with other words; without one by open_clip's tokenizer.
        export_to: Folder for ``model.safetensors`` and ``model_config.json`` of the model at the end of training, for
            ``checkpoint_path`` and ``model_config`` of `OpenClipBackbone` and `OpenClipTextEncoder`. Files of those
            names are replaced. None writes nothing; see `export`.
        lr: Learning rate.
        weight_decay: Weight decay of matrices; scales, biases and the temperature have none, as in CLIP.
        optimizer: Name in ``torch.optim``, class path, or ``{"class_path": ..., "init_args": {...}}``.
        lr_scheduler: The same for ``torch.optim.lr_scheduler``.

    Attributes:
        backbone: The image tower.
        text: The text tower, with the temperature ``logit_scale``.

    Raises:
        ValueError: The configuration is not one of open_clip, or an argument is out of range.
        FileNotFoundError: There is no file at ``model_config``.

    Example:
        >>> tiny = {
        ...     "embed_dim": 16,
        ...     "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        ...     "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocabulary": ["red", "wing"]},
        ... }
        >>> model = ContrastiveModule(tiny)
        >>> model(torch.rand(4, 3, 32, 32), ["red", "wing"]).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model_config: ModelConfig,
        export_to: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer: ClassSpec = "AdamW",
        lr_scheduler: ClassSpec | None = None,
    ) -> None:
        super().__init__()
        check_positive(lr=lr)
        check_optimizer(optimizer, lr, weight_decay)
        check_scheduler(lr_scheduler, None)
        self.model_config = clip_config("model_config", model_config)
        if "multimodal_cfg" in self.model_config:
            raise ValueError("model_config: CoCa has a captioning loss of its own, which is not trained here; use CLIP")
        self.export_to, self.lr, self.weight_decay = export_to, lr, weight_decay
        self.optimizer_spec, self.scheduler_spec = optimizer, lr_scheduler
        # the image tower is a backbone, so that datamodules prepare pixels for it as they will for the exported one
        self.backbone = OpenClipBackbone("model_config", model_config=self.model_config)
        self.text = make_clip("model_config", model_config=self.model_config)
        self.text.visual = nn.Identity()
        self._words = word_tokenizer(self.model_config["text_cfg"])
        other = make_tokenizer("model_config", self.model_config["text_cfg"], registered=False)
        self._tokenize = other if self._words is None else self._words
        self.class_sentences: list[str] | None = None
        self._class_vectors: Tensor | None = None
        self.accuracy: MulticlassAccuracy | None = None
        own = {"_class_path": f"{type(self).__module__}.{type(self).__qualname__}", "model_config": self.model_config}
        given = {"lr": lr, "weight_decay": weight_decay, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.save_hyperparameters({**own, **given, "export_to": export_to})

    # ---------------------------------------------------------------- the two towers

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """``[B, T]`` logits of ``T`` texts for each image: the cosines times the learned scale."""
        pictures, sentences = self.encode_images(images), self.encode_texts(texts)
        with torch.autocast(self.device.type, enabled=False):
            logits: Tensor = self.text.logit_scale.exp() * pictures @ sentences.T
        return logits

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, D]`` vectors of length 1."""
        return normalize(self.backbone(images).pooled.float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """``[T, D]`` vectors of length 1."""
        return normalize(self.text.encode_text(self.tokens(texts)).float(), dim=-1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """``[T, context_length]`` token numbers.

        Raises:
            ValueError: The vocabulary of the configuration lacks words; the message names them.
        """
        if self._words is not None and (unknown := self._words.describe_unknown(texts)) is not None:
            raise ValueError(f"text_cfg: {unknown}; add them to the vocabulary of the model_config")
        return self._tokenize(list(texts)).to(self.device)

    # ---------------------------------------------------------------- steps

    def read_batch(self, batch: Any) -> Batch:
        """The batch as a dict; override it for batches of another form.

        Raises:
            ValueError: It has no captions, or not one an image.
        """
        content = read_batch(batch)
        captions = content.get("caption")
        if captions is None:
            raise ValueError(
                f"the batch has no 'caption', only {sorted(content)}: yield a sentence an image (RenderedBirds does so "
                "with captions: true)"
            )
        if isinstance(captions, str) or len(captions) != len(content["image"]):
            raise ValueError(f"caption: expected {len(content['image'])} sentences, one an image, got {captions!r}")
        return content

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The contrastive loss of a batch, with the images and captions of all processes as negatives."""
        content = self.read_batch(batch)
        loss = self.contrast(content, self.trainer.world_size)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(content["image"]))
        return loss

    def contrast(self, batch: Batch, world_size: int = 1) -> Tensor:
        """The loss of a batch, in single precision; with a larger ``world_size`` negatives come from all processes."""
        import open_clip

        images, texts = self.encode_images(batch["image"]), self.encode_texts(batch["caption"])
        among = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=self.global_rank, world_size=world_size)
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor = among(images, texts, self.text.logit_scale.exp(), self.text.logit_bias)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the temperature within the bounds of CLIP: the cosines are scaled by at most 100."""
        with torch.no_grad():
            self.text.logit_scale.clamp_(0.0, math.log(100.0))

    def setup(self, stage: str) -> None:
        """Ask the datamodule for a sentence a class."""
        data = getattr(self.trainer, "datamodule", None)
        self.class_sentences = getattr(data, "class_descriptions", None)
        if self.class_sentences is not None:
            self.accuracy = MulticlassAccuracy(len(self.class_sentences), average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and, where the classes have sentences, accuracy of a validation batch."""
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and, where the classes have sentences, accuracy of a test batch."""
        self.evaluate(batch, batch_idx, "test")

    def evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        """Log the loss of a batch, and count which class sentence lies nearest to each image."""
        content = self.read_batch(batch)
        size = len(content["image"])
        self.log(f"{stage}/loss", self.contrast(content), batch_size=size, sync_dist=True)
        if self.class_sentences is None or self.accuracy is None or "label" not in content:
            return
        if batch_idx == 0 or self._class_vectors is None:
            # the weights have changed since the last evaluation
            self._class_vectors = self.encode_texts(self.class_sentences)
        nearest = (self.encode_images(content["image"]) @ self._class_vectors.T).argmax(-1)
        self.accuracy.update(nearest, content["label"])
        self.log(f"{stage}/label_acc", self.accuracy, prog_bar=True, batch_size=size)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``embedding [B, D]``: the images in the space that they share with texts, vectors of length 1."""
        return {"embedding": self.encode_images(read_batch(batch)["image"])}

    # ---------------------------------------------------------------- optimizer and export

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer; matrices decay, scales, biases and the temperature do not."""
        learned = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if p.ndim > 1]},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = make_optimizer(self.optimizer_spec, groups, self.lr, self.weight_decay)
        if self.scheduler_spec is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) and steps > 0 else None
        scheduler, interval = make_scheduler(self.scheduler_spec, optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def on_fit_end(self) -> None:
        """Export the model of a complete run."""
        dry = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.export_to is not None and self.trainer.is_global_zero and not dry:
            self.export(self.export_to)

    def export(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, in open_clip's layout, and ``model_config.json``; each replaced when done.

        Args:
            folder: Made if it is not there.
        """
        home = Path(folder).expanduser()
        home.mkdir(parents=True, exist_ok=True)
        image = {f"visual.{name}": weight for name, weight in self.backbone.tower.visual.state_dict().items()}
        weights = {name: w.detach().cpu().contiguous() for name, w in {**image, **self.text.state_dict()}.items()}
        drafts = {name: home / f".{name}.draft" for name in (WEIGHTS, CONFIG)}
        save_file(weights, drafts[WEIGHTS])
        drafts[CONFIG].write_text(json.dumps(self.model_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, draft in drafts.items():
            draft.replace(home / name)
        rank_zero_info(f"The model is in {home / WEIGHTS}, its configuration in {home / CONFIG}.")
