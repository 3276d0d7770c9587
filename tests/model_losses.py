"""What every model of the zoo learns from: a loss, and a small batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import svitt_models
from tests.svitt_models import seed

BATCH = 4
Generator = torch.Generator | None


def video(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seed(1))


def numbers(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=seed(2))


def classify(generator: Generator, model: Any, clip: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(clip), labels)


def encode(generator: Generator, model: Any, clip: Tensor) -> Tensor:
    seen = model(clip, generator=generator)
    return seen.tokens.square().mean() + seen.pooled.sin().mean()


def read(generator: Generator, model: Any, ids: Tensor) -> Tensor:
    return model(ids).sin().mean()


def pair(generator: Generator, model: Any, clip: Tensor, ids: Tensor) -> Tensor:
    return model(clip, ids, generator=generator).total


def answer(generator: Generator, model: Any, clip: Tensor, ids: Tensor, answers: Tensor) -> Tensor:
    each = torch.arange(len(clip))
    return model(clip, ids, None, answers, None, each, torch.ones(len(clip)), generator=generator)


def tokenize(generator: Generator, model: Any, clip: Tensor) -> Tensor:
    reconstruction, quantized = model(clip, generator)
    return F.mse_loss(reconstruction, clip) + quantized.commitment_loss


def find_codes(generator: Generator, model: Any, codes: Tensor) -> Tensor:
    order = torch.arange(12).expand(len(codes), -1)
    logits = model(codes, order[:, :5], order[:, 5:])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(1)[:, 5:].flatten())


def next_codes(generator: Generator, model: Any, codes: Tensor, classes: Tensor, frames: Tensor) -> Tensor:
    return F.cross_entropy(model(codes, classes=classes, frames=frames).flatten(0, -2), codes.flatten())


def denoise(generator: Generator, model: Any, clip: Tensor, steps: Tensor, classes: Tensor, text: Tensor) -> Tensor:
    return F.mse_loss(model(clip, steps, classes=classes, text=text), clip.sin())


def features(generator: Generator, model: Any, clip: Tensor) -> Tensor:
    return model(clip).sin().mean()


CLIP, WORDS = svitt_models.random_video(BATCH), svitt_models.random_words(BATCH)
LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "LapsViT": (classify, (video(BATCH, 4, 3, 8, 12), numbers(3, BATCH))),
    "LapsVisformer": (classify, (video(BATCH, 4, 3, 32, 32), numbers(3, BATCH))),
    "VideoEncoder": (encode, (CLIP,)),
    "TextEncoder": (read, (WORDS,)),
    "SViTT": (pair, (CLIP, WORDS)),
    "VideoAnswers": (answer, (CLIP, WORDS, svitt_models.random_words(BATCH, 4))),
    "VQVAE": (tokenize, (video(BATCH, 3, 4, 16, 16),)),
    "VQGAN": (tokenize, (video(BATCH, 3, 4, 16, 16),)),
    "MeBT": (find_codes, (numbers(7, BATCH, 3, 2, 2),)),
    "VideoGPT": (next_codes, (numbers(7, BATCH, 2, 4, 4), numbers(3, BATCH), video(BATCH, 3, 1, 8, 8))),
    "VideoDiT": (
        denoise,
        (video(BATCH, 2, 3, 4, 6), numbers(1000, BATCH, 3), numbers(3, BATCH), video(BATCH, 4, 5)),
    ),
    "ResNet3d": (features, (video(BATCH, 3, 2, 8, 8),)),
}
"""For each model a loss of it, ``loss(generator, model, *batch)``, and the batch."""
