"""What a model of videos is given: pixels in a certain range, and axes in a certain order."""

import warnings

import torch
from torch import Tensor

BEYOND = 10.0
"""What no pixel of a normalised video reaches; those of 0 to 255 nearly all do."""


def require_pixels(op: str, name: str, video: Tensor, channels: int, wanted: str) -> None:
    """A video is of floating-point numbers, and has as many `channels`, in front of time, height and width.

    Args:
        op: for messages. name: of the argument. wanted: the range of its pixels, for messages.

    Raises:
        TypeError, ValueError: it is not.

    Example:
        >>> require_pixels("VQVAE", "video", torch.zeros(1, 3, 4, 16, 16), 3, "from -0.5 to 0.5")
    """
    if not video.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor, of pixels {wanted}, got {name}.dtype={video.dtype}"
        )
    if video.dim() != 5 or video.shape[1] != channels:
        frames_first = video.dim() == 5 and video.shape[2] == channels
        hint = f"; that is (B, T, C, H, W), of which {name}.transpose(1, 2) has this order" if frames_first else ""
        raise ValueError(
            f"{op}: {name} must have shape (B, {channels}, T, H, W), got {name}.shape={tuple(video.shape)}{hint}"
        )


def warn_of_bytes(op: str, name: str, video: Tensor, wanted: str) -> None:
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
                f"{op}: {name} must have pixels {wanted}, got some of magnitude {largest:g}", UserWarning, stacklevel=2
            )
