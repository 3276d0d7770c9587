"""Training that can be stopped and resumed, and its loss as a picture."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from vattn.models.checkpoints import PretrainedModel
from vattn.models.vqvae import Tokenizer

SAVE_EVERY = 100  # steps
Batch = TypeVar("Batch")


@dataclasses.dataclass
class Training:
    """A model in training, which can be saved and resumed at any step."""

    name: str
    model: nn.Module
    steps: int
    learning_rate: float
    path: pathlib.Path
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)

    def run(self, batches: Iterator[Batch], loss_of: Callable[[Batch], Tensor], until: int | None = None) -> None:
        """Train up to step `until`, or to the last one, after which the model is saved as a folder of its own."""
        self.model.train()
        end = self.steps if until is None else until
        with tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step") as bar:
            while self.step < end:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate * warm_and_cool(self.step, self.steps)
                loss = loss_of(next(batches))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.losses.append(loss.item())
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if self.step % SAVE_EVERY == 0 or self.step == end:
                    self.save()
        self.model.eval()
        if self.step == self.steps and isinstance(self.model, PretrainedModel):
            self.model.save_pretrained(self.path.with_suffix(""))

    def save(self) -> None:
        """Write a checkpoint; one that is interrupted leaves the last one as it was."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "random": torch.get_rng_state(),
        }
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def resume(self) -> bool:
        """Go on from the checkpoint, random numbers included, if there is one."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]
        torch.set_rng_state(state["random"])
        return True


def warm_and_cool(step: int, steps: int) -> float:
    """The share of the learning rate: linear over the first twentieth of the steps, then half a cosine to 0."""
    warm = min(1.0, (step + 1) / (0.05 * steps))
    return warm * (1 + math.cos(math.pi * step / steps)) / 2


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
