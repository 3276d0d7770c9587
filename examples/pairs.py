"""One's own videos and captions, from a CSV file, for retrieval.

    file,caption
    beach.mp4,A dog runs along the beach.
    beach.mp4,a dog at the sea
    garden/cat.mov,a cat sleeps in the garden

A file may have several captions, and a caption several files. The last quarter of each video is held out.
"""

import csv
import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor

from examples import clips
from examples.captions import BATCH, HELD_OUT_CLIPS, PAD, Batch, Pairs, Words, random_crop, with_changes

SPAN = 16  # frames between the first and the last one of a clip, both included
COLUMNS = ("file", "caption")
PICTURED = 3  # videos


def read_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
    """Files and captions.

    Raises:
        ValueError: the file is no CSV with these columns, or a line lacks one.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        if any(name not in names for name in COLUMNS):
            raise ValueError(f"{path} must begin with the columns {','.join(COLUMNS)}, got {','.join(names)}")
        pairs = []
        for row in reader:
            name, caption = ((row[column] or "").strip() for column in COLUMNS)
            if not name or not Words.split(caption):
                raise ValueError(f"{path} must have a file and a caption in each line, got {row} in {reader.line_num}")
            pairs.append((name, caption))
    return pairs


class OwnPairs(Pairs):
    """The videos and captions of a CSV file.

    Args:
        path: of the CSV file.
        folder: of the videos; None for that of the CSV file.
        size: of a frame, in pixels.
        fps: frames per second that are read; None for all.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or there are not two different videos and captions.
    """

    def __init__(self, path: pathlib.Path, folder: pathlib.Path | None, size: int, fps: float | None) -> None:
        self.size = size
        pairs = read_pairs(path)
        files = {name: (folder or path.parent) / name for name, _ in pairs}
        loaded = clips.load_files(files, size + size // 8, fps=fps, num_frames=clips.frames_to_split(SPAN))
        self.trained, self.tested = (dict(zip(loaded, part, strict=True)) for part in clips.split([*loaded.values()]))
        self.pairs = [(name, text) for name, text in pairs if name in loaded]
        texts = [*dict.fromkeys(text for _, text in self.pairs)]
        if len(loaded) < 2 or len(texts) < 2:
            raise ValueError(
                f"{path} must have two different videos and two different captions, or more, "
                f"got {len(loaded)} and {len(texts)}"
            )
        self.words = Words(texts)
        self.ids = self.words.encode(texts)
        self.mask = (self.ids != PAD).long()
        self.numbers = {text: i for i, text in enumerate(texts)}
        together = {*self.pairs}
        right = torch.tensor([[(name, text) in together for text in texts] for name in loaded])
        self.right = right.repeat_interleave(HELD_OUT_CLIPS, 0)
        self.aspects = []
        self.told = [()] * len(texts)
        self.shown = [()] * len(self.right)
        self.titles = [
            f"{name}, frame {len(self.trained[name]) + start}"
            for name, video in self.tested.items()
            for start in _starts(video)
        ]
        self.pictured = range(0, HELD_OUT_CLIPS * min(PICTURED, len(loaded)), HELD_OUT_CLIPS)

    def batches(self, num_frames: int) -> Iterator[Batch]:
        """All videos and all captions of a batch are different."""
        while True:
            chosen: dict[str, str] = {}
            for i in torch.randperm(len(self.pairs)).tolist():
                name, text = self.pairs[i]
                if len(chosen) < BATCH and name not in chosen and text not in chosen.values():
                    chosen[name] = text
            if len(chosen) < 2:  # there would be no wrong pair
                continue
            video = torch.stack([self._random(name, num_frames) for name in chosen])
            texts = torch.tensor([self.numbers[text] for text in chosen.values()])
            yield Batch(with_changes(video), self.ids[texts], self.mask[texts], torch.arange(len(chosen)))

    def _random(self, name: str, num_frames: int) -> Tensor:
        frames = self.trained[name]
        start = int(torch.randint(len(frames) - SPAN + 1, ()))
        return random_crop(_clip(frames, start, num_frames), self.size)

    def held_out(self, num_frames: int) -> Tensor:
        found = [_clip(video, start, num_frames) for video in self.tested.values() for start in _starts(video)]
        return clips.centre(torch.stack(found), self.size)


def _clip(frames: Tensor, start: int, num_frames: int) -> Tensor:
    return frames[start + torch.linspace(0, SPAN - 1, num_frames).round().long()]


def _starts(video: Tensor) -> list[int]:
    """Where the clips of a video begin that are tested."""
    return torch.linspace(0, len(video) - SPAN, HELD_OUT_CLIPS).round().int().tolist()
