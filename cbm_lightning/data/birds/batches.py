"""From stored rows to batches: pixels normalised, masks looked up in part maps, captions written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbm_lightning.backbones.base import ImageStats
from cbm_lightning.data.birds.attributes import Group
from cbm_lightning.data.birds.captions import captions
from cbm_lightning.types import Batch


@dataclass(frozen=True)
class BirdBatches:
    """Turns fetched rows into a batch.

    Rows hold ``frames [B,T,3,H,H]`` in uint8, and as needed ``frame_parts [B,T,H,H]``, ``shown [B,T,K]`` (whether each
    concept holds in each frame), ``values`` and ``mentioned [B,G]``; all else is passed on.

    Args:
        concept_parts: ``[K, parts]`` bool, the parts whose pixels show each concept.
        groups: What captions speak of.
        stats: Normalisation of pixels, None to leave them in [0, 1].
        masks: Make masks of concepts.
        details: Pass part maps on.
    """

    concept_parts: Tensor
    groups: Sequence[Group]
    stats: ImageStats | None = None
    masks: bool = False
    details: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """The batch of some rows."""
        video = self._normalised(batch.pop("frames"))
        batch["image"] = video[:, 0]
        clips = video.shape[1] > 1
        if clips:
            batch["video"] = video
        parts = batch.pop("frame_parts", None)
        shown = batch.pop("shown", None)
        if self.details:
            batch["part_map"] = parts[:, 0]
            if clips:
                batch["video_part_map"] = parts
        if self.masks:
            masks = self.concept_parts.T[parts.long()].movedim(-1, 2) & shown[..., None, None]
            batch["concept_masks"] = masks[:, 0]
            if clips:
                batch["video_masks"] = masks
        if "mentioned" in batch:
            batch["caption"] = captions(self.groups, batch.pop("values"), batch.pop("mentioned"), batch["index"])
        return batch

    def _normalised(self, pixels: Tensor) -> Tensor:
        scaled = pixels.float().div_(255)
        if self.stats is None:
            return scaled
        mean, std = (torch.tensor(row).view(-1, 1, 1) for row in self.stats)
        return scaled.sub_(mean).div_(std)
