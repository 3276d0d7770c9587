"""Checks of the videos that a model is given: the range of pixels, and the order of axes."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CENTRED = "pixels from -0.5 to 0.5"
NORMALISED = "normalised pixels (minus a mean, over a deviation)"
BEYOND = 10.0
"""What no pixel of a normalised video reaches; those of 0 to 255 nearly all do."""


def require_pixels(
    op: str, name: str, video: Tensor, channels: int, pixels: str, multiples: Sequence[int] = (1, 1, 1)
) -> None:
    """A video is of floating-point numbers, and has as many `channels`, in front of time, height and width.

    Args:
        op: for messages. name: of the argument. pixels: their range, for messages.
        multiples: of these, time, height and width are.

    Raises:
        TypeError, ValueError: it is not.

    Example:
        >>> require_pixels("VQVAE", "video", torch.zeros(1, 3, 4, 16, 16), 3, CENTRED, (2, 4, 4))
    """
    if not video.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, of {pixels}, got {name}.dtype={video.dtype}")
    is_video = video.dim() == 5
    sizes = zip(video.shape[2:], multiples, strict=False)
    if not is_video or video.shape[1] != channels or any(size % factor or size == 0 for size, factor in sizes):
        frames_first = is_video and video.shape[1] != channels and video.shape[2] == channels
        hint = f"; that is (B, T, C, H, W), of which {name}.transpose(1, 2) has this order" if frames_first else ""
        raise ValueError(
            f"{op}: {name} must have shape (B, C, T, H, W), with C = {channels}, and T, H and W multiples of "
            f"{tuple(multiples)}, got {name}.shape={tuple(video.shape)}{hint}"
        )


def require_frames(op: str, name: str, video: Tensor, sizes: Sequence[int | str]) -> None:
    """A video is of floating-point numbers, and has frames in front of channels: ``(B, T, C, H, W)``.

    Args:
        op: for messages. name: of the argument.
        sizes: T, C, H and W, or letters for those that are not fixed.

    Raises:
        TypeError, ValueError: it is not.

    Example:
        >>> require_frames("LapsViT", "video", torch.zeros(1, 8, 3, 16, 16), (8, 3, "H", "W"))
    """
    if not video.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor, of {NORMALISED}, got {name}.dtype={video.dtype}"
        )
    is_video = video.dim() == 5
    if not is_video or any(x != size for x, size in zip(video.shape[1:], sizes, strict=True) if isinstance(size, int)):
        channels_first = is_video and tuple(video.shape[1:3]) == (sizes[1], sizes[0])
        hint = f"; that is (B, C, T, H, W), of which {name}.transpose(1, 2) has this order" if channels_first else ""
        raise ValueError(
            f"{op}: {name} must have shape (B, {', '.join(map(str, sizes))}), "
            f"got {name}.shape={tuple(video.shape)}{hint}"
        )


def warn_of_bytes(model: nn.Module, name: str, video: Tensor, pixels: str) -> None:
    """Warn of pixels in 0 to 255, in the first video of a model only, because reading its values waits for a GPU."""
    if torch.compiler.is_compiling() or getattr(model, "_has_seen_a_video", False):
        return
    is_traced = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    if type(video) is Tensor and not is_traced and not video.is_meta and video.numel() > 0:
        model._has_seen_a_video = True  # type: ignore[assignment]
        largest = float(video.detach().abs().amax())
        if largest > BEYOND:
            warnings.warn(
                f"{type(model).__name__}: {name} must have {pixels}, got some of magnitude {largest:g}",
                UserWarning,
                stacklevel=2,
            )
