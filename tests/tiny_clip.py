"""Tiny open_clip configurations, one for each kind of image tower."""

from __future__ import annotations

from typing import Any

TEXT = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": TEXT,
}
RESNET: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": TEXT,
}
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "custom_text": True,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": TEXT,
}
CONVNEXT: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
    "text_cfg": TEXT,
}
EVA: dict[str, Any] = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
    "text_cfg": TEXT,
}
AVERAGE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {**VIT["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": TEXT,
}
COCA: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {**VIT["vision_cfg"], "attentional_pool": True, "attn_pooler_queries": 4, "output_tokens": True},
    "text_cfg": TEXT,
}
