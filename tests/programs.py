"""What people do with each model of the zoo, as functions of tensors that all begin with the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.model_zoo import MODELS


class Program(nn.Module):
    """What is called of a model, as a module that takes tensors alone."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


class Entry(NamedTuple):
    """What is called of a model, with inputs for a batch of a size."""

    inputs: Callable[[int], tuple[Tensor, ...]]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)


def _video(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def _words(batch: int) -> Tensor:
    return torch.randint(2, 29, (batch, 6))


def _described(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A class, a text, and where it has words."""
    return torch.randint(3, (batch,)), torch.randn(batch, 4, 5), torch.tensor([[True] * 3 + [False]]).repeat(batch, 1)


def _places(batch: int) -> Tensor:
    return torch.arange(12).repeat(batch, 1)


def _answer(model: Any, video: Tensor, question: Tensor) -> Tensor:
    return model.states(video, question, None)


def _match(model: Any, video: Tensor, words: Tensor) -> Any:
    seen, text = model.encode_video(video), model.text(words)
    return model.similarity(seen.pooled, text[:, 0]), model.match(seen.tokens, text)


PROGRAMS: dict[str, Entry] = {
    "LapsViT": Entry(_video(4, 3, 8, 12)),
    "LapsVisformer": Entry(_video(4, 3, 32, 32)),
    "VideoEncoder": Entry(_video(4, 3, 8, 12)),
    "TextEncoder": Entry(lambda batch: (_words(batch), torch.ones(batch, 6, dtype=torch.int64))),
    "SViTT": Entry(lambda batch: (torch.randn(batch, 4, 3, 8, 12), _words(batch)), _match),
    "VideoAnswers": Entry(lambda batch: (torch.randn(batch, 4, 3, 8, 12), _words(batch)), _answer),
    "VQVAE": Entry(_video(3, 4, 16, 16)),
    "VQGAN": Entry(_video(3, 4, 16, 16)),
    "MeBT": Entry(
        lambda batch: (torch.randint(7, (batch, 3, 2, 2)), _places(batch)[:, :5], _places(batch)[:, 5:]),
    ),
    "VideoGPT": Entry(
        lambda batch: (torch.randint(7, (batch, 2, 4, 4)), torch.randint(3, (batch,)), torch.randn(batch, 3, 1, 8, 8)),
        lambda model, codes, classes, frames: model(codes, classes=classes, frames=frames),
    ),
    "VideoDiT": Entry(
        lambda batch: (torch.randn(batch, 2, 3, 4, 6), 999 * torch.rand(batch, 3), *_described(batch)),
        lambda model, latents, timesteps, classes, text, mask: model(
            latents, timesteps, classes=classes, text=text, text_mask=mask
        ),
    ),
    "ResNet3d": Entry(_video(3, 2, 8, 8)),
}


def make(name: str) -> Program:
    """The program of a model, in evaluation mode."""
    return Program(MODELS[name].make(), PROGRAMS[name].call).eval()
