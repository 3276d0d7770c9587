"""Writing videos: MP4 with PyAV (H.264), GIF with Pillow."""

import os
from fractions import Fraction

import av
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vattn.models.settings import number, require_path

WRITERS = (".mp4", ".gif")


def write_video(path: str | os.PathLike[str], frames: Tensor, *, fps: float = 10.0) -> None:
    """Write an MP4 or a GIF, whichever the name of the file ends with.

    Args:
        path: of an MP4, which is H.264 and plays in browsers: a last row or column is repeated where H or W is odd. Or
            of a GIF, which has up to 256 colours in a frame, and plays again and again.
        frames: RGB, ``(T, H, W, 3)`` or ``(3, T, H, W)``, all at least 1: uint8, or floating-point from 0 to 1. Where
            both shapes fit, it is the first one.
        fps: frames per second; a GIF rounds the time of a frame to hundredths of a second, and has one long frame for
            equal ones that follow each other.

    Raises:
        TypeError: `frames` is no tensor of these dtypes.
        ValueError: another shape; pixels that are not from 0 to 1; the name of the file ends otherwise.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "noise.gif"
        >>> write_video(path, torch.rand(8, 24, 32, 3), fps=8)
        >>> path.stat().st_size > 0
        True
    """
    suffix = require_path("write_video", "path", path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"write_video: path must end with {' or '.join(WRITERS)}, got path={path}")
    number("write_video", "fps", fps, 0, above=True)
    pixels = _pixels(frames)
    if suffix == ".gif":
        first, *others = (Image.fromarray(image.numpy()) for image in pixels)
        first.save(path, save_all=True, append_images=others, duration=max(10, round(1000 / fps)), loop=0)
    else:
        _write_mp4(path, pixels, fps)


def _pixels(frames: object) -> Tensor:
    """``(T, H, W, 3)`` uint8, on the CPU."""
    if not isinstance(frames, Tensor) or not (frames.dtype == torch.uint8 or frames.is_floating_point()):
        got = f"frames.dtype={frames.dtype}" if isinstance(frames, Tensor) else f"frames={type(frames).__name__}"
        raise TypeError(f"write_video: frames must be a uint8 or floating-point tensor, got {got}")
    is_video = frames.dim() == 4 and frames.numel() > 0
    if not is_video or (frames.shape[3] != 3 and frames.shape[0] != 3):
        raise ValueError(
            f"write_video: frames must have shape (T, H, W, 3) or (3, T, H, W), got frames.shape={tuple(frames.shape)}"
        )
    frames = frames.detach().cpu()
    if frames.shape[3] != 3:
        frames = frames.permute(1, 2, 3, 0)
    if frames.is_floating_point():
        least, most = (x.item() for x in frames.aminmax())
        if not (least >= 0 and most <= 1):
            raise ValueError(
                "write_video: frames must be from 0 to 1 if they are floating-point, "
                f"got values from frames={least:g} to frames={most:g}"
            )
        frames = (255 * frames.float()).round().to(torch.uint8)
    return frames.contiguous()


def _write_mp4(path: str | os.PathLike[str], pixels: Tensor, fps: float) -> None:
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:  # colours have half the resolution
        padded = F.pad(pixels.permute(0, 3, 1, 2).float(), (0, width % 2, 0, height % 2), mode="replicate")
        pixels = padded.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    with av.open(os.fspath(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
