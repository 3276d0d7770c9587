"""Clips of the real videos, with captions made from what is in them: which video, which part, which way, how fast.

A caption is the same for many clips, which begin at different moments. The middle of each part is held out::

    part of a video    0 ............. 20 | 21 ........... 38 | 39 ............. 59
                       clips to train on    clips held out      clips to train on
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from examples import clips

SUBJECTS = {
    "bikes": "a street full of bikes",
    "carphone_pristine": "a man talking in a car",
    "bigbuckbunny": "a big rabbit in the grass",
}
PARTS = ("early", "late")
DIRECTIONS = ("forwards", "backwards")
SPANS = {"slowly": 4, "fast": 16}
"""Frames between the first and the last frame of a clip, both included."""

HELD_OUT = 0.3  # of the frames of each part
AMPLIFIED, WARMTH = 16.0, 3.0  # changes and colours are then about as large as brightness
PAD, FIRST, MASK = 0, 1, 2  # words that no caption has


@dataclasses.dataclass(frozen=True)
class Caption:
    """What a clip shows."""

    video: str
    part: str
    direction: str
    speed: str

    def __str__(self) -> str:
        return f"{SUBJECTS[self.video]} {self.part} in the video running {self.direction} and {self.speed}"


def captions() -> list[Caption]:
    """Every combination."""
    names = [name for name in SUBJECTS if name in clips.NAMES]
    return [Caption(*parts) for parts in itertools.product(names, PARTS, DIRECTIONS, SPANS)]


class Words:
    """Numbers of words, and the other way around."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.known = sorted({word for text in texts for word in text.split()})
        self.numbers = {word: i for i, word in enumerate(self.known, MASK + 1)}

    def __len__(self) -> int:
        return MASK + 1 + len(self.known)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(B, L)`` int64, padded to the longest one."""
        rows = [torch.tensor([FIRST, *(self.numbers[word] for word in text.split())]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class Clips:
    """The videos, square, `size` pixels wide, and clips of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        margin = size // 8  # for random crops
        self.videos = {name: clips.to_model(clips.decode(name, size + margin)) for name in clips.NAMES}

    def ranges(self, caption: Caption) -> list[tuple[int, int]]:
        """Where the frames of its part of the video are: before those that are held out, those, and behind them."""
        length = len(self.videos[caption.video]) // len(PARTS)
        start, border = PARTS.index(caption.part) * length, round(length * (1 - HELD_OUT) / 2)
        middle, behind = start + border, start + length - border
        return [(start, middle), (middle, behind), (behind, start + length)]

    def clip(self, caption: Caption, num_frames: int, first: int) -> Tensor:
        """``(T, 3, S, S)``, a little larger than `size`: the clip that begins at frame `first`, if it runs forwards."""
        span = SPANS[caption.speed]
        frames = first + torch.linspace(0, span - 1, num_frames).round().long()
        return self.videos[caption.video][frames.flip(0) if caption.direction == "backwards" else frames]

    def random(self, caption: Caption, num_frames: int) -> Tensor:
        """A clip to train on, ``(T, 3, size, size)``: any moment, any crop.

        None is mirrored: what moves to the left would move to the right, as in a clip that runs backwards.
        """
        before, _, behind = self.ranges(caption)
        first, end = before if torch.rand(()) < 0.5 else behind
        clip = self.clip(caption, num_frames, int(torch.randint(first, end - SPANS[caption.speed] + 1, ())))
        top, left = (int(x) for x in torch.randint(clip.shape[-1] - self.size + 1, (2,)))
        return clip[..., top : top + self.size, left : left + self.size]

    def held_out(self, caption: Caption, num_frames: int, count: int) -> Tensor:
        """Clips that were held out, ``(count, T, 3, size, size)``: at moments far from each other, their centres."""
        _, (first, end), _ = self.ranges(caption)
        moments = torch.linspace(first, end - SPANS[caption.speed], count).round().int().tolist()
        found = torch.stack([self.clip(caption, num_frames, moment) for moment in moments])
        border = (found.shape[-1] - self.size) // 2
        return F.pad(found, [-border, border + self.size - found.shape[-1]] * 2)


def with_changes(videos: Tensor) -> Tensor:
    """Brightness, its change since the frame before, and how warm the colour is, in place of red, green and blue.

    The way and the speed of a clip lie in its changes: small ones, that a model which sees the colours of patches does
    not find within minutes. Here they are amplified, and squashed to -1 to 1, as a cut changes everything.

    Shape:
        ``(B, T, 3, H, W)`` to the same.
    """
    grey, warmth = videos.mean(2), videos[:, :, 0] - videos[:, :, 2]
    changes = F.pad(grey.diff(dim=1), (0, 0, 0, 0, 1, 0))
    return torch.stack([grey, (AMPLIFIED * changes).tanh(), (WARMTH * warmth).tanh()], 2)
