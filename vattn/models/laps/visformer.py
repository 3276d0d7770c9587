"""The Visformer of LAPS: convolutions first, leap attention later.

    stem 7x7, patches 4x4   stage 1   patches 2x2   stage 2   patches 2x2   stage 3   mean, head
    3 -> C/2, H/8 x W/8     convs     C, H/16       leap      2 C, H/32     leap

All maps are in channels_last format, where a 1x1 convolution is a linear layer, and leap attention reads its
output where it lies.

Chen et al., "Visformer: The Vision-friendly Transformer" (ICCV 2021); Zhang et al., "Leap Attention with
Periodic Shift for Video Transformers" (ACM MM 2022).
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vattn.models.batch_norm import BatchNorm2d
from vattn.models.cards import random_video
from vattn.models.checkpoints import PretrainedModel, count_blocks, heads_or_default, official_weights
from vattn.models.laps.frames import Block, FrameModel, Levels, hidden_size, layer_leaps, official_fold_div
from vattn.models.layers import init_linear, named
from vattn.models.settings import Config, number, official_settings, require_told
from vattn.nn import LeapAttention2d

LEVELS = ((1, 2, 3, 1), (2, 3, 1, 2))
"""Of stage 2 and stage 3, as the official configuration for 8 frames has them."""


class LapsVisformer(FrameModel, PretrainedModel):
    """The Visformer of LAPS. Settings default to the official Visformer-S for 8 frames of Kinetics-400.

    A stem and three stages of 1, 2 and 4 times ``embed_dim / 2`` channels; maps shrink by 8, 2 and 2. All maps
    are in channels_last format, where a 1x1 convolution is a linear layer and attention needs no copy.

    Args:
        num_frames: T.
        levels: two lists, for stage 2 and stage 3; block i of a stage has the level
            ``levels[stage][i % len(levels[stage])]``, see :func:`vattn.nn.leap_of_level`.
        fold_div: divisor of the periodic shift, 0 for none.
        image_size: height and width of a frame.
        stem_channels: channels of the 7x7 stem, or None for patches of 8x8 without a stem.
        num_classes, num_heads, mlp_ratio, qkv_bias: as in any ViT; without `qkv_bias` no block has a bias.
        embed_dim: channels of stage 2.
        depth: blocks of each stage.
        groups: of the 3x3 convolutions in MLPs; below 2, those MLPs have 5/6 of the channels, otherwise twice.
        attn_stage: "1" for each stage with attention; stage 1 has none in LAPS.
        spatial_conv: "1" for each stage whose MLPs have a 3x3 convolution.
        scale_exponent: scores are multiplied by ``head_dim ** scale_exponent``.

    Shape:
        ``(B, T, 3, H, W)`` to logits ``(B, num_classes)``; `forward_frames` gives ``(B, T, num_classes)`` and
        `features` the ``(B, T, 2 * embed_dim)`` that the head reads.

    Raises:
        TypeError, ValueError: a setting or a video that does not fit.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification"; Chen et al.,
        "Visformer: The Vision-friendly Transformer".

    Example:
        >>> model = LapsVisformer(image_size=64, num_classes=5, embed_dim=32, depth=(1, 2, 2), num_heads=2)
        >>> model(torch.randn(2, 8, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        num_frames: int = 8,
        levels: tuple[Levels, Levels] = LEVELS,
        fold_div: int = 4,
        *,
        image_size: int = 224,
        stem_channels: int | None = 32,
        num_classes: int = 400,
        embed_dim: int = 384,
        depth: tuple[int, int, int] = (7, 4, 4),
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        groups: int = 8,
        attn_stage: str = "011",
        spatial_conv: str = "100",
        scale_exponent: float = -0.5,
    ) -> None:
        super().__init__()
        for name, flags in (("attn_stage", attn_stage), ("spatial_conv", spatial_conv)):
            if len(flags) != 3 or set(flags) - {"0", "1"}:
                raise ValueError(f'LapsVisformer: {name} must be three of "0" and "1", got {name}={flags!r}')
        for name, factor in (("mlp_ratio", mlp_ratio), ("scale_exponent", scale_exponent)):
            number("LapsVisformer", name, factor, -math.inf)
        if attn_stage[0] == "1":
            raise ValueError(f"LapsVisformer: stage 1 must have no attention, got attn_stage={attn_stage!r}")
        if len(levels) != 2:
            raise ValueError(f"LapsVisformer: levels must be a list for stage 2 and one for stage 3, got {levels=}")
        self.num_frames = num_frames
        dims = (embed_dim // 2, embed_dim, 2 * embed_dim)
        sides = (image_size // 8, image_size // 16, image_size // 32)
        leaps: list[Iterator[int | None]] = [itertools.repeat(None, depth[0])]
        leaps += [layer_leaps("LapsVisformer", stage, depth[i], num_frames) for i, stage in enumerate(levels, 1)]

        def attention(dim: int, leap: int | None) -> nn.Module:
            head_dim = dim // num_heads
            return LeapAttention2d(
                dim, num_heads, num_frames, leap, fold_div=fold_div, head_dim=head_dim, qkv_bias=qkv_bias,
                proj_bias=False, scale=float(head_dim) ** scale_exponent,
            )  # fmt: skip

        def mlp(dim: int, spatial: bool) -> nn.Module:
            if not spatial:
                return _conv_mlp(dim, hidden_size(dim, mlp_ratio))
            return _conv_mlp(dim, dim * 5 // 6 if groups < 2 else 2 * dim, groups)

        def stage(i: int) -> nn.Module:
            return nn.Sequential(
                *(
                    Block(
                        lambda: _batch_norm(dims[i]),
                        attention(dims[i], leap) if attn_stage[i] == "1" else None,
                        mlp(dims[i], spatial_conv[i] == "1"),
                    )
                    for leap in leaps[i]
                )
            )

        if stem_channels is None:
            self.stem: nn.Module = nn.Identity()
            self.patch_embed1 = _patch_embed(3, dims[0], 8)
        else:
            convolution = nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(convolution, _batch_norm(stem_channels), nn.ReLU())
            self.patch_embed1 = _patch_embed(stem_channels, dims[0], 4)
        self.pos_embed1, self.pos_embed2, self.pos_embed3 = (
            nn.Parameter(torch.zeros(1, dim, side, side)) for dim, side in zip(dims, sides, strict=True)
        )
        self.stage1 = stage(0)
        self.patch_embed2 = _patch_embed(dims[0], dims[1], 2)
        self.stage2 = stage(1)
        self.patch_embed3 = _patch_embed(dims[1], dims[2], 2)
        self.stage3 = stage(2)
        self.norm = _batch_norm(dims[2])
        self.head = nn.Linear(dims[2], num_classes)
        for embedding in (self.pos_embed1, self.pos_embed2, self.pos_embed3):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.apply(_init_weights)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "LapsVisformer":
        """The model of an official checkpoint, in evaluation mode; its sizes are read from the weights.

        Args:
            state_dict: of ``Visformer`` in ``visformer/models_LAPS.py``, with batch norms, with or without the
                prefixes and the outer dict that the official training script adds. It is copied; dtype and
                device stay.
            config: the official configuration, whole or in part, of which ``NUM_FRAMES``, ``S2_SKIP_LEVEL``,
                ``S3_SKIP_LEVEL`` and ``FOLD_DIV`` are read, which it must have unless they are overridden, and
                ``num_heads`` and ``qk_scale``, if it has them. Heads have 64 channels otherwise. ``qk_scale`` is an
                exponent here: q and k are *each* multiplied by ``head_dim ** qk_scale``, and None is -0.25. Without a
                configuration, the first four are those of the official Visformer-S, the defaults of the constructor.
            overrides: settings of the constructor, which win over those of `config` and of the weights.

        Raises:
            TypeError, ValueError: the weights and the settings do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "LapsVisformer.from_official"
        cls._require_overrides(op, overrides)
        weights = official_weights(op, state_dict, "patch_embed2.proj.weight", "pos_embed1", "head.weight")
        blocks = ("stage1.0", "stage2.0", "stage3.0")
        embed_dim = weights["patch_embed2.proj.weight"].shape[0]
        stem = weights.get("stem.0.weight")
        spatial = [f"{block}.mlp.conv2.weight" in weights for block in blocks]
        groups, ratios = 8, []
        for block, is_spatial in zip(blocks, spatial, strict=True):
            if is_spatial:
                hidden, per_group = weights[f"{block}.mlp.conv2.weight"].shape[:2]
                groups = hidden // per_group
            elif f"{block}.mlp.conv1.weight" in weights:
                hidden, dim = weights[f"{block}.mlp.conv1.weight"].shape[:2]
                ratios.append(hidden / dim)
        settings: dict[str, Any] = {
            "image_size": 8 * weights["pos_embed1"].shape[-1],
            "stem_channels": None if stem is None else stem.shape[0],
            "num_classes": weights["head.weight"].shape[0],
            "embed_dim": embed_dim,
            "depth": tuple(count_blocks(weights, stage) for stage in ("stage1", "stage2", "stage3")),
            # Official hidden sizes are int(ratio * dim) in every stage: the largest quotient gives all of them.
            "mlp_ratio": max(ratios, default=4.0),
            "qkv_bias": any(name.endswith("qkv.bias") for name in weights),
            "groups": groups,
            "attn_stage": "".join(str(int(f"{block}.attn.qkv.weight" in weights)) for block in blocks),
            "spatial_conv": "".join(str(int(flag)) for flag in spatial),
        } | official_settings(op, config, cls, num_frames="NUM_FRAMES", num_heads="num_heads")
        names = {"stage2": "S2_SKIP_LEVEL", "stage3": "S3_SKIP_LEVEL"}
        stages = official_settings(op, config, dict.fromkeys(names, Levels), **names)
        exponents = official_settings(op, config, {"exponent": float}, exponent="qk_scale")
        if exponents:
            settings["scale_exponent"] = 2 * exponents["exponent"]
        settings |= official_fold_div(op, config) | overrides
        if config is not None:
            require_told(op, config, settings, num_frames="NUM_FRAMES", fold_div="FOLD_DIV")
            if "levels" not in overrides:
                require_told(op, config, stages, **names)
                settings["levels"] = (stages["stage2"], stages["stage3"])
        settings["num_heads"] = heads_or_default(op, settings.get("num_heads"), embed_dim)
        return cls._from_weights(weights, settings)

    def _usage(self) -> str:
        classes = self.config["num_classes"]
        return f"{random_video(self.config)}\nlogits = model(video)  # (1, {classes})"

    def features(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the pooled map of every frame, ``(B, T, 2 * embed_dim)``."""
        x = self.stem(self.frames(video).contiguous(memory_format=torch.channels_last))
        for patch_embed, pos_embed, stage in (
            (self.patch_embed1, self.pos_embed1, self.stage1),
            (self.patch_embed2, self.pos_embed2, self.stage2),
            (self.patch_embed3, self.pos_embed3, self.stage3),
        ):
            x = patch_embed(x)
            if x.shape[-2:] != pos_embed.shape[-2:]:
                raise ValueError(
                    f"LapsVisformer: video must have frames that make maps of {tuple(pos_embed.shape[-2:])}, "
                    f"got video.shape={tuple(video.shape)}"
                )
            x = stage(x + pos_embed)
        return self.per_frame(self.norm(x).mean((-2, -1)))

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the logits of every frame, ``(B, T, num_classes)``."""
        return self.head(self.features(video))


def _batch_norm(dim: int) -> nn.Module:
    return named(bn=BatchNorm2d(dim))


def _patch_embed(dim: int, new_dim: int, size: int) -> nn.Module:
    return named(proj=nn.Conv2d(dim, new_dim, size, stride=size), norm=_batch_norm(new_dim))


def _conv_mlp(dim: int, hidden: int, groups: int | None = None) -> nn.Module:
    """1x1, GELU, 1x1; with `groups` a grouped 3x3 and a second GELU in between."""
    spatial: dict[str, nn.Module] = {}
    if groups is not None:
        convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        spatial = {"conv2": convolution, "act2": nn.GELU()}
    return named(
        conv1=nn.Conv2d(dim, hidden, 1, bias=False),
        act1=nn.GELU(),
        **spatial,
        conv3=nn.Conv2d(hidden, dim, 1, bias=False),
    )


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
