from __future__ import annotations

import torch

from cbm_lightning.bottlenecks import SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import FeatureDims, Features


def test_similarities_keep_single_precision_under_autocast_and_the_encoder_is_let_go() -> None:
    class Encoder(torch.nn.Module):
        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.eye(len(texts), 64)

    bottleneck = SimilarityBottleneck(Encoder(), standardize=False)
    bottleneck.build(FeatureDims(64), ConceptSet(["a", "b"]), 2)
    assert bottleneck._init_args["text_encoder"] is None
    features = torch.randn(16, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = bottleneck(Features(features)).logits
    torch.testing.assert_close(logits, 100 * torch.nn.functional.normalize(features, dim=-1)[:, :2])
