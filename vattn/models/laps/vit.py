"""The ViT of LAPS: a vision transformer whose layers leap.

    x = x + leap_attention(LN(x))        of each frame's tokens, and its partner's
    x = x + MLP(LN(x))

Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vattn.models.cards import random_video
from vattn.models.checkpoints import PretrainedModel, count_blocks, heads_or_default, official_weights
from vattn.models.laps.frames import Block, FrameModel, Levels, hidden_size, layer_leaps, official_fold_div
from vattn.models.layers import init_linear, named
from vattn.models.settings import Config, number, official_settings, require_told
from vattn.nn import LeapAttention


class LapsViT(FrameModel, PretrainedModel):
    """The ViT of LAPS. Settings default to the official ViT-B/16 for 8 frames of Kinetics-400.

    Args:
        num_frames: T.
        levels: layer i has the level ``levels[i % len(levels)]``, see :func:`vattn.nn.leap_of_level`; None is
            attention within each frame.
        fold_div: divisor of the periodic shift, 0 for none.
        image_size: height and width of a frame, or one number for both.
        patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in any ViT.
        scale: factor of the attention scores; None means ``head_dim ** -0.5``.

    Shape:
        ``(B, T, 3, H, W)`` to logits ``(B, num_classes)``; `forward_frames` gives ``(B, T, num_classes)`` and
        `features` the ``(B, T, embed_dim)`` that the head reads.

    Raises:
        TypeError, ValueError: a setting or a video that does not fit.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification"; Dosovitskiy
        et al., "An Image is Worth 16x16 Words" (ICLR 2021).

    Example:
        >>> model = LapsViT(8, image_size=32, patch_size=16, num_classes=5, embed_dim=64, depth=4, num_heads=4)
        >>> model(torch.randn(2, 8, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        num_frames: int = 8,
        levels: Levels = (1, 2, 3, 1),
        fold_div: int = 4,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 400,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        number("LapsViT", "mlp_ratio", mlp_ratio, 0)
        if scale is not None:
            number("LapsViT", "scale", scale, -math.inf)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        num_patches = (height // patch_size) * (width // patch_size)
        self.num_frames, self.grid = num_frames, (height // patch_size, width // patch_size)
        self.patch_embed = named(proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, embed_dim))
        hidden = hidden_size(embed_dim, mlp_ratio)
        self.blocks = nn.Sequential(
            *(
                Block(
                    lambda: nn.LayerNorm(embed_dim, eps=1e-6),
                    LeapAttention(
                        embed_dim, num_heads, num_frames, leap, fold_div=fold_div, qkv_bias=qkv_bias, scale=scale
                    ),
                    named(fc1=nn.Linear(embed_dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, embed_dim)),
                )
                for leap in layer_leaps("LapsViT", levels, depth, num_frames)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.apply(init_linear)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "LapsViT":
        """The model of an official checkpoint, in evaluation mode; its sizes are read from the weights.

        Args:
            state_dict: of ``VisionTransformer`` in ``timm/models/vit_laps.py``, with or without the prefixes and
                the outer dict that the official training script adds. It is copied; dtype and device stay.
            config: the official configuration, whole or in part, of which ``NUM_FRAMES``, ``S2_SKIP_LEVEL`` and
                ``FOLD_DIV`` are read, which it must have unless they are overridden, and ``num_heads``, ``img_size``
                and ``qk_scale``, if it has them. Heads have 64 channels and frames are square otherwise. Without a
                configuration, the first three are those of the official ViT-B/16, the defaults of the constructor.
            overrides: settings of the constructor, which win over those of `config` and of the weights.

        Raises:
            TypeError, ValueError: the weights and the settings do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "LapsViT.from_official"
        cls._require_overrides(op, overrides)
        needed = "patch_embed.proj.weight", "pos_embed", "head.weight", "blocks.0.mlp.fc1.weight"
        weights = official_weights(op, state_dict, *needed)
        embed_dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        settings = {
            "image_size": patch_size * round((weights["pos_embed"].shape[1] - 1) ** 0.5),
            "patch_size": patch_size,
            "num_classes": weights["head.weight"].shape[0],
            "embed_dim": embed_dim,
            "depth": count_blocks(weights, "blocks"),
            "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        } | official_settings(
            op, config, cls, num_frames="NUM_FRAMES", levels="S2_SKIP_LEVEL", num_heads="num_heads",
            image_size="img_size", scale="qk_scale",
        )  # fmt: skip
        settings["scale"] = settings.get("scale") or None  # as in the official code, 0 is none
        settings |= official_fold_div(op, config) | overrides
        if config is not None:
            require_told(op, config, settings, num_frames="NUM_FRAMES", levels="S2_SKIP_LEVEL", fold_div="FOLD_DIV")
        settings["num_heads"] = heads_or_default(op, settings.get("num_heads"), embed_dim)
        return cls._from_weights(weights, settings)

    def _usage(self) -> str:
        classes = self.config["num_classes"]
        return f"{random_video(self.config)}\nlogits = model(video)  # (1, {classes})"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.grid}"

    def features(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the class token of every frame, ``(B, T, embed_dim)``."""
        x = self.patch_embed(self.frames(video))
        if tuple(x.shape[-2:]) != self.grid:  # as many patches in another grid would have positions of others
            raise ValueError(
                f"LapsViT: video must have frames of {self.pos_embed.shape[1] - 1} patches, "
                f"{' x '.join(map(str, self.grid))}, got video.shape={tuple(video.shape)}"
            )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.per_frame(self.norm(self.blocks(x)[:, 0]))

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the logits of every frame, ``(B, T, num_classes)``."""
        return self.head(self.features(video))
