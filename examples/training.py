"""What the examples share in training: the optimizer, batches of codes, and losses as a picture."""

import pathlib
from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from vattn.models.vqvae import Tokenizer
from vattn.training import Training


def new_training(name: str, model: nn.Module, steps: int, learning_rate: float, path: pathlib.Path) -> Training:
    """A training with the optimizer of all examples."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    return Training(model, optimizer, path, steps=steps, name=name)


def code_batches(codes: Tensor, count: int) -> Iterator[Tensor]:
    """Endless batches of random windows of codes."""
    while True:
        yield codes[torch.randint(len(codes), (count,))]


@torch.no_grad()
def encode(tokenizer: Tokenizer, videos: Tensor, title: str) -> Tensor:
    """The codes of windows, some at a time."""
    return torch.cat([tokenizer.encode(part) for part in tqdm(videos.split(8), desc=title, unit="batch")])


def write_losses(trainings: Sequence[Training], labels: Sequence[str], path: pathlib.Path) -> None:
    """The loss of each training over its steps, side by side."""
    figure = Figure(figsize=(4.5 * len(trainings), 3.5), layout="constrained")
    panels = figure.subplots(1, len(trainings), squeeze=False)[0]
    for axes, training, label in zip(panels, trainings, labels, strict=True):
        axes.plot(range(1, len(training.losses) + 1), training.losses, linewidth=0.8)
        axes.set(title=training.name, xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)
