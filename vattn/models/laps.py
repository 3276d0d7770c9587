"""LAPS: an image classifier that sees a video, through leap attention and periodic shift alone.

    video (B, T, 3, H, W) -> B*T frames -> image model, attention within leap pairs -> mean of the T logits

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
Layer i leaps ``T // 2**levels[i % len(levels)]`` frames, so that a few layers connect all frames, without a
parameter more than the image model has::

    T = 8       who meets whom                      what frame 0 has heard of
    level 1     0-4  1-5  2-6  3-7                  4
    level 2     0-2  1-3  4-6  5-7                  4  2 6
    level 3     0-1  2-3  4-5  6-7                  4  2 6  1 5 3 7

Here is the ViT. :class:`LapsVisformer` and :func:`video_from_image`, which turns any image ViT of transformers
or timm into a video model, have files of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vattn.models._common import Block, FrameModel, Levels, hidden_size, layer_leaps
from vattn.models.checkpoints import count_blocks, heads_or_default, load, official_weights
from vattn.models.layers import init_linear, named
from vattn.models.video_from_image import VideoFromImage, video_from_image
from vattn.models.visformer import LapsVisformer
from vattn.nn import LeapAttention

__all__ = ["LapsViT", "LapsVisformer", "VideoFromImage", "video_from_image"]


class LapsViT(FrameModel):
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
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        num_patches = (height // patch_size) * (width // patch_size)
        self.num_frames = num_frames
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
    def from_official(
        cls,
        state_dict: Mapping[str, Any],
        num_frames: int = 8,
        levels: Levels = (1, 2, 3, 1),
        fold_div: int = 4,
        *,
        num_heads: int | None = None,
        image_size: tuple[int, int] | None = None,
        scale: float | None = None,
    ) -> "LapsViT":
        """The model of an official checkpoint, in evaluation mode; all sizes are read from the weights.

        Args:
            state_dict: of ``VisionTransformer`` in ``timm/models/vit_laps.py``, with or without the prefixes and
                the outer dict that the official training script adds. It is copied; dtype and device stay.
            num_frames, levels, fold_div: ``NUM_FRAMES``, ``S2_SKIP_LEVEL`` and ``FOLD_DIV`` of its configuration.
            num_heads: ``embed_dim // 64`` if None.
            image_size: height and width of a frame, if it is not square.
            scale: factor of the attention scores, if not ``head_dim ** -0.5``.

        Raises:
            ValueError: the weights do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        weights = official_weights(
            "LapsViT.from_official", state_dict, "patch_embed.proj.weight", "pos_embed", "head.weight"
        )
        embed_dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        side = patch_size * round((weights["pos_embed"].shape[1] - 1) ** 0.5)
        return load(
            weights,
            lambda: cls(
                num_frames,
                levels,
                fold_div,
                image_size=image_size or side,
                patch_size=patch_size,
                num_classes=weights["head.weight"].shape[0],
                embed_dim=embed_dim,
                depth=count_blocks(weights, "blocks"),
                num_heads=heads_or_default("LapsViT.from_official", num_heads, embed_dim),
                mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
                qkv_bias="blocks.0.attn.qkv.bias" in weights,
                scale=scale,
            ),
        )

    def features(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the class token of every frame, ``(B, T, embed_dim)``."""
        x = self.patch_embed(self.frames(video)).flatten(2).transpose(1, 2)
        if x.shape[1] + 1 != self.pos_embed.shape[1]:
            raise ValueError(
                f"LapsViT: video must have frames of {self.pos_embed.shape[1] - 1} patches, "
                f"got video.shape={tuple(video.shape)}"
            )
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.per_frame(self.norm(self.blocks(x)[:, 0]))

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the logits of every frame, ``(B, T, num_classes)``."""
        return self.head(self.features(video))
