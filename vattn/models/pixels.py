"""What a model of videos is given: pixels in a certain range, and axes in a certain order."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

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
        >>> require_pixels("VQVAE", "video", torch.zeros(1, 3, 4, 16, 16), 3, "from -0.5 to 0.5", (2, 4, 4))
    """
    if not video.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor, of pixels {pixels}, got {name}.dtype={video.dtype}"
        )
    is_video = video.dim() == 5
    sizes = zip(video.shape[2:], multiples, strict=False)
    if not is_video or video.shape[1] != channels or any(size % factor or size == 0 for size, factor in sizes):
        frames_first = is_video and video.shape[1] != channels and video.shape[2] == channels
        hint = f"; that is (B, T, C, H, W), of which {name}.transpose(1, 2) has this order" if frames_first else ""
        raise ValueError(
            f"{op}: {name} must have shape (B, C, T, H, W), with C = {channels}, and T, H and W multiples of "
            f"{tuple(multiples)}, got {name}.shape={tuple(video.shape)}{hint}"
        )


def warn_of_bytes(op: str, name: str, video: Tensor, pixels: str) -> None:
    """Warn of pixels that must be those of 0 to 255. It waits for a GPU, so that it is for the first video only."""
    if (
        not torch._C._are_functorch_transforms_active()
        and type(video) is Tensor
        and not video.is_meta
        and video.numel() > 0
    ):
        largest = float(video.detach().abs().amax())
        if largest > BEYOND:
            warnings.warn(
                f"{op}: {name} must have pixels {pixels}, got some of magnitude {largest:g}", UserWarning, stacklevel=2
            )
