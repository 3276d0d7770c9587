"""timm's vision transformers with leap attention.

    timm.create_model("vit_base_patch16_224", block_fn=leap_blocks(num_frames=8))

timm's ``VisionTransformer`` makes its blocks by a function that it is given, `block_fn`; here one whose blocks have
:class:`vattn.nn.LeapAttention` in the place of timm's ``Attention``. Names and shapes of the parameters stay, so that
timm's weights load. A model that exists already is changed by :func:`vattn.models.laps.video_from_image`.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from vattn import _checks
from vattn._extras import needs
from vattn.models.laps.frames import Levels, layer_leaps
from vattn.nn import LeapAttention

__all__ = ["leap_blocks"]


def leap_blocks(
    num_frames: int,
    *,
    levels: Levels = (1, 2, 3, 1),
    fold_div: int = 0,
    block_fn: Callable[..., nn.Module] | None = None,
) -> Callable[..., nn.Module]:
    """A `block_fn` for timm's ``VisionTransformer``: blocks whose attention leaps.

    The model is then given ``(B * T, 3, H, W)``, the frames of a video one after the other, and gives an output for
    each frame. Each frame has class and register tokens of its own, which leap like the others.

    Args:
        num_frames: T, frames of a video; at least 8 for the default levels.
        levels: block i has the level ``levels[i % len(levels)]``, see :func:`vattn.nn.leap_of_level`; None is attention
            within each frame.
        fold_div: divisor of the periodic shift, 0 for none.
        block_fn: timm's block to begin with, such as ``ParallelThingsBlock``; None is ``Block``.

    Raises:
        ImportError: timm is not installed, and `block_fn` is None.
        TypeError: a setting of the wrong type; later, in the model, a block without an attention ``attn`` that has
            linear layers ``qkv`` and ``proj``.
        ValueError: a setting that does not fit; later, in the model, an attention with other parameters than timm's
            ``Attention``, such as a gate, or one whose forward takes more than a mask, such as rotary positions.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022), on
        adapting an image model.

    Example:
        >>> model = timm.create_model("vit_tiny_patch16_224", block_fn=leap_blocks(8), img_size=32, num_classes=5)
        >>> model(torch.randn(2 * 8, 3, 32, 32)).unflatten(0, (2, 8)).mean(1).shape    # the mean over frames
        torch.Size([2, 5])
    """
    op = "leap_blocks"
    _checks.integer(op, "num_frames", num_frames, least=1)
    _checks.integer(op, "fold_div", fold_div, least=0)
    leaps = list(layer_leaps(op, levels, None, num_frames))

    make = block_fn or _block(op)

    def leap_block(*, depth: int, **settings: Any) -> nn.Module:
        block: Any = make(depth=depth, **settings)
        attention = getattr(block, "attn", nn.Identity())
        block.attn = LeapAttention.from_attention(attention, num_frames, leaps[depth % len(leaps)], fold_div=fold_div)
        return block

    return leap_block


def _block(op: str) -> Callable[..., nn.Module]:
    with needs(op, "timm"):
        from timm.models.vision_transformer import Block

    return cast("Callable[..., nn.Module]", Block)
