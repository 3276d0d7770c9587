"""Reading video files with PyAV: whole videos, and random clips of many.

    file      |f0|f1|f2|f3|f4|f5|f6|f7|...      frames at the times that the file says
    fps=None      |f1|f2|f3|f4|                 the frames from `start` on, as they are
    fps=f         |f1|   |f3|   |f5|            those nearest to start, start + 1 / f, start + 2 / f, ...

A clip is decoded when it is asked for, from the last keyframe before it on.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vattn import _checks
from vattn.models.settings import number, require_path

AnyPath = str | os.PathLike[str]
Timed = tuple[float, "av.VideoFrame"]  # seconds since the first frame, and a frame

SUFFIXES = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv", ".y4m",
)  # fmt: skip
"""What the names of videos in a folder end with. A file that is named itself is read whatever its name ends with."""
CROPS = ("centre", "random")
ROUNDING = 1e-3  # seconds, to which some containers round the times of frames
LEAST_CROP = 0.8  # a random crop has at least this share of the height and the width of the largest one


def video_files(folder: AnyPath) -> list[pathlib.Path]:
    """The videos of a folder and of the folders in it, by their :data:`SUFFIXES`, in alphabetical order.

    Raises:
        FileNotFoundError: there is no such folder, or no video in it.

    Example:
        >>> video_files("clips")
        Traceback (most recent call last):
        FileNotFoundError: video_files: folder must be a folder, got folder=clips
    """
    top = require_path("video_files", "folder", folder)
    if not top.is_dir():
        raise FileNotFoundError(f"video_files: folder must be a folder, got folder={folder}")
    files = sorted(path for path in top.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(
            f"video_files: folder must have files that end with one of {' '.join(SUFFIXES)}, got folder={folder}"
        )
    return files


def read_video(
    path: AnyPath,
    *,
    size: int | Sequence[int] | None = None,
    fps: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    crop: str = "centre",
) -> Tensor:
    """The frames of a video file, upright, in any container and codec that PyAV reads.

    Args:
        path: of the file.
        size: pixels of a frame, ``(H, W)`` or one number for both: the largest part of that shape is cut out of each
            frame, and resized (bilinear, antialiased). None leaves frames as they are.
        fps: frames per second: those nearest to ``start + i / fps``. None takes all frames from `start` on.
        start: in seconds from the first frame.
        num_frames: how many; None for all to the end.
        crop: ``"centre"`` cuts from the middle of the frames; ``"random"`` at a place, and with 0.8 to 1 times the
            height and the width of the largest part, that torch's generator draws once for the video.

    Returns:
        ``(3, T, H, W)`` uint8, RGB: ``read_video(path) / 255`` is from 0 to 1.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a setting that does not fit; a file that cannot be read, or has too few frames. The
            message names the file.

    Example:
        >>> import pathlib, tempfile
        >>> from vattn.training import write_video
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "grey.mp4"
        >>> write_video(path, torch.full((12, 32, 48, 3), 128, dtype=torch.uint8), fps=10)
        >>> read_video(path).shape
        torch.Size([3, 12, 32, 48])
        >>> read_video(path, size=16, fps=5, start=0.5, num_frames=3).shape
        torch.Size([3, 3, 16, 16])
    """
    op = "read_video"
    require_path(op, "path", path)
    wanted = _size(op, size)
    number(op, "start", start, 0)
    if num_frames is not None:
        _checks.integer(op, "num_frames", num_frames, least=1)
    _require_settings(op, fps, crop)
    decoded = _decode(path, start)
    frames = _from(decoded, start) if fps is None else _at_rate(decoded, start, fps)
    images: list[Tensor] = []
    box = None
    for frame in itertools.islice(frames, num_frames):
        image = _upright(frame)
        if wanted is not None:
            box = box or _box(image.shape[1], image.shape[2], wanted, crop)
            image = _resize(image, box, wanted)
        images.append(image)
    if len(images) < (num_frames or 1):
        rate = "" if fps is None else f" at fps={fps:g}"
        raise ValueError(
            f"{op}: path must have at least {num_frames or 1} frames{rate} from start={start:g} on, "
            f"got {len(images)} from path={path}"
        )
    return torch.stack(images).transpose(0, 1)


class VideoClips(Dataset[Tensor]):
    """A clip of each of many videos, at a random moment: only its frames are decoded, when it is asked for.

    Moments and random crops come from torch's generator, which :class:`vattn.training.Training` saves, and which
    ``torch.utils.data.DataLoader`` seeds in each of its workers.

    Args:
        videos: a folder, see :func:`video_files`, or the files themselves.
        num_frames: T, of a clip.
        size, fps, crop: see :func:`read_video`.

    Shape:
        Item i is ``(3, T, H, W)`` uint8, of ``files[i]``.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`read_video` does; ValueError: a video is shorter than a
            clip, which is found when it is first read.

    Example:
        >>> import pathlib, tempfile
        >>> from vattn.training import write_video
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a", "b", "c"):
        ...     write_video(folder / f"{name}.mp4", torch.rand(3, 12, 32, 48))
        >>> loader = torch.utils.data.DataLoader(VideoClips(folder, 8, 16, crop="random"), batch_size=3, shuffle=True)
        >>> next(iter(loader)).shape
        torch.Size([3, 3, 8, 16, 16])
    """

    def __init__(
        self,
        videos: AnyPath | Sequence[AnyPath],
        num_frames: int,
        size: int | Sequence[int],
        *,
        fps: float | None = None,
        crop: str = "centre",
    ) -> None:
        op = "VideoClips"
        _checks.integer(op, "num_frames", num_frames, least=1)
        _size(op, size)
        _require_settings(op, fps, crop)
        if isinstance(videos, (str, os.PathLike)):
            self.files = video_files(videos)
        elif isinstance(videos, Sequence):
            self.files = [require_path(op, "videos", path) for path in videos]
        else:
            raise TypeError(f"{op}: videos must be a folder or a list of files, got videos={videos!r}")
        if not self.files:
            raise ValueError(f"{op}: videos must be a folder or at least one file, got videos={videos!r}")
        self.num_frames, self.size, self.fps, self.crop = num_frames, size, fps, crop
        self._times: dict[pathlib.Path, list[float]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        if path not in self._times:
            self._times[path] = frame_times(path)
        times = self._times[path]
        if self.fps is None:
            starts = len(times) - self.num_frames + 1
        else:
            span = (self.num_frames - 1) / self.fps
            starts = sum(time + span <= times[-1] + ROUNDING for time in times)
        if starts < 1:
            rate = "" if self.fps is None else f" at fps={self.fps:g}"
            raise ValueError(
                f"VideoClips: videos must have at least {self.num_frames} frames{rate}, "
                f"got {len(times)} in {times[-1]:g} s from {path}"
            )
        start = times[int(torch.randint(starts, ()))]
        return read_video(path, size=self.size, fps=self.fps, start=start, num_frames=self.num_frames, crop=self.crop)


def frame_times(path: AnyPath) -> list[float]:
    """When each frame of a video is shown, in seconds from the first one: read from the file without decoding it.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or has no frame.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stamps = []
        try:
            for packet in container.demux(stream):
                stamp = packet.dts if packet.pts is None else packet.pts
                if packet.size and stamp is not None and not packet.is_discard:
                    stamps.append(stamp)
        except av.FFmpegError as error:
            raise _unreadable(path, error) from error
        if not stamps:
            raise ValueError(f"frame_times: path must be a video with frames that have a time, got path={path}")
        first = min(stamps)
        return sorted(float((stamp - first) * _tick(stream)) for stamp in stamps)


def _open(path: AnyPath) -> "av.container.InputContainer":
    if not os.path.isfile(path):
        raise FileNotFoundError(f"read_video: path must be a file, got path={path}")
    try:
        container = av.open(os.fspath(path))
    except av.FFmpegError as error:
        raise _unreadable(path, error) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"read_video: path must be a file with a video stream, got path={path}")
    return container


def _unreadable(path: AnyPath, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or error
    return ValueError(f"read_video: path must be a video that PyAV can read, got path={path} ({reason})")


def _decode(path: AnyPath, start: float) -> Iterator[Timed]:
    """Frames and their seconds since the first one, from `start` on or a little before."""
    try:
        if start > 0:
            with _open(path) as container:
                stream = container.streams.video[0]
                first = next(container.decode(stream), None)
                if first is not None and first.pts is not None:
                    container.seek(first.pts + math.floor(start / _tick(stream)), stream=stream)
                    frames = _timed(container, first)
                    earliest = next(frames, None)
                    if earliest is not None and earliest[0] <= start:  # some containers go too far
                        yield earliest
                        yield from frames
                        return
        with _open(path) as container:
            yield from _timed(container, None)
    except av.FFmpegError as error:
        raise _unreadable(path, error) from error


def _timed(container: "av.container.InputContainer", first: "av.VideoFrame | None") -> Iterator[Timed]:
    """The frames from here on, and their seconds since `first`, which is the next one if it is None."""
    stream = container.streams.video[0]
    for count, frame in enumerate(container.decode(stream)):
        first = first or frame
        if frame.pts is None or first.pts is None:  # a stream without times
            yield count / float(stream.average_rate or 25), frame
        else:
            yield float((frame.pts - first.pts) * _tick(stream)), frame


def _tick(stream: "av.VideoStream") -> Fraction:
    """The unit of the times of a stream, in seconds."""
    return stream.time_base or Fraction(1)


def _from(frames: Iterator[Timed], start: float) -> "Iterator[av.VideoFrame]":
    return (frame for time, frame in frames if time >= start - ROUNDING)


def _at_rate(frames: Iterator[Timed], start: float, fps: float) -> "Iterator[av.VideoFrame]":
    """For each moment ``start + i / fps`` the frame nearest to it, up to the end of the last one."""
    count, gap = 0, 1 / fps
    previous: Timed | None = None
    for current in frames:
        if previous is not None:
            gap = current[0] - previous[0]
            while start + count / fps < (previous[0] + current[0]) / 2:
                yield previous[1]
                count += 1
        previous = current
    while previous is not None and start + count / fps < previous[0] + gap / 2:
        yield previous[1]
        count += 1


def _upright(frame: "av.VideoFrame") -> Tensor:
    """RGB ``(3, H, W)`` uint8, turned as the file says: telephones store their videos lying on a side."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return image.rot90(round(frame.rotation / 90)).permute(2, 0, 1)


def _box(height: int, width: int, size: tuple[int, int], crop: str) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of a frame that becomes `size`."""
    scale = min(height / size[0], width / size[1])
    if crop == "random":
        scale *= LEAST_CROP + (1 - LEAST_CROP) * float(torch.rand(()))
    rows, columns = (max(1, round(scale * pixels)) for pixels in size)
    if crop == "random":
        top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
    else:
        top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, rows, columns


def _resize(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    top, left, rows, columns = box
    part = image[:, top : top + rows, left : left + columns]
    resized = F.interpolate(part[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().to(torch.uint8)


def _size(op: str, size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    sizes = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"{op}: size must be (H, W) or one number for both, got size={size}")
    for pixels in sizes:
        _checks.integer(op, "size", pixels, least=1)
    return sizes[0], sizes[1]


def _require_settings(op: str, fps: object, crop: object) -> None:
    if fps is not None:
        number(op, "fps", fps, 0, above=True)
    if crop not in CROPS:
        raise ValueError(f"{op}: crop must be one of {', '.join(CROPS)}, got crop={crop!r}")
