"""Clips of the real videos, with captions made from what is in them: which video, which part, which way, how fast.

A caption is the same for many clips, which begin at different moments. The middle of each part is held out::

    part of a video    0 ............. 20 | 21 ........... 38 | 39 ............. 59
                       clips to train on    clips held out      clips to train on
"""

import abc
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
BATCH = 12  # clips
HELD_OUT_CLIPS = 3  # for each caption, or each of one's own videos


class Batch(NamedTuple):
    """Clips and their captions: pairs of the same number in `pair_ids` belong together."""

    video: Tensor
    ids: Tensor
    mask: Tensor
    pair_ids: Tensor


class Pairs(abc.ABC):
    """Clips and captions, to learn from and to test on.

    Attributes:
        words: of all captions.
        ids, mask: of all captions, ``(texts, L)``, and what of them is not padding.
        right: bool ``(clips, texts)``, which caption is right for which held-out clip.
        aspects: names of what a caption tells, if each tells the same things.
        told: what each caption tells about these. shown: what each held-out clip shows of them.
        titles: of the held-out clips. pictured: the numbers of some.
    """

    words: "Words"
    ids: Tensor
    mask: Tensor
    right: Tensor
    aspects: Sequence[str]
    told: Sequence[tuple[str, ...]]
    shown: Sequence[tuple[str, ...]]
    titles: Sequence[str]
    pictured: Sequence[int]

    @abc.abstractmethod
    def batches(self, num_frames: int) -> Iterator[Batch]:
        """Endless, of clips ``(B, T, 3, size, size)`` :func:`with_changes`."""

    @abc.abstractmethod
    def held_out(self, num_frames: int) -> Tensor:
        """All clips to test on, ``(clips, T, 3, size, size)`` in -1 to 1."""


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
        self.known = sorted({word for text in texts for word in self.split(text)})
        self.numbers = {word: i for i, word in enumerate(self.known, MASK + 1)}

    def __len__(self) -> int:
        return MASK + 1 + len(self.known)

    @staticmethod
    def split(text: str) -> list[str]:
        """Its words, in lower case."""
        return re.findall(r"\w+", text.lower())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(B, L)`` int64, padded to the longest one."""
        rows = [torch.tensor([FIRST, *(self.numbers[word] for word in self.split(text))]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class Clips:
    """The videos, square, `size` pixels wide, and clips of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        margin = size // 8  # for random crops
        self.videos = {name: clips.to_model(video) for name, video in clips.load(size + margin).items()}

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
        return random_crop(clip, self.size)

    def held_out(self, caption: Caption, num_frames: int, count: int) -> Tensor:
        """Clips that were held out, ``(count, T, 3, size, size)``: at moments far from each other, their centres."""
        _, (first, end), _ = self.ranges(caption)
        moments = torch.linspace(first, end - SPANS[caption.speed], count).round().int().tolist()
        return clips.centre(torch.stack([self.clip(caption, num_frames, moment) for moment in moments]), self.size)


class MadePairs(Pairs):
    """The clips that come along and their captions."""

    def __init__(self, size: int) -> None:
        self.clips = Clips(size)
        self.captions = captions()
        texts = [str(caption) for caption in self.captions]
        self.words = Words(texts)
        self.ids = self.words.encode(texts)
        self.mask = (self.ids != PAD).long()
        self.right = torch.eye(len(texts), dtype=torch.bool).repeat_interleave(HELD_OUT_CLIPS, 0)
        self.aspects = [field.name for field in dataclasses.fields(Caption)]
        self.told = [dataclasses.astuple(caption) for caption in self.captions]
        self.shown = [told for told in self.told for _ in range(HELD_OUT_CLIPS)]
        self.titles = [text for text in texts for _ in range(HELD_OUT_CLIPS)]
        forwards = [i for i, caption in enumerate(self.captions) if caption.direction == "forwards"]
        self.pictured = [*{self.captions[i].video: HELD_OUT_CLIPS * i for i in forwards}.values()]

    def batches(self, num_frames: int) -> Iterator[Batch]:
        while True:
            chosen = torch.randperm(len(self.captions))[:BATCH]
            video = with_changes(torch.stack([self.clips.random(self.captions[i], num_frames) for i in chosen]))
            yield Batch(video, self.ids[chosen], self.mask[chosen], chosen)

    def held_out(self, num_frames: int) -> Tensor:
        return torch.cat([self.clips.held_out(caption, num_frames, HELD_OUT_CLIPS) for caption in self.captions])


def random_crop(clip: Tensor, size: int) -> Tensor:
    """Any part of `size` pixels of a square clip ``(T, 3, S, S)``."""
    top, left = (int(x) for x in torch.randint(clip.shape[-1] - size + 1, (2,)))
    return clip[..., top : top + size, left : left + size]


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
