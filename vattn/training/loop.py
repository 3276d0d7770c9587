"""A training loop that can be stopped at any step, and goes on as if it had not been.

checkpoint = model, optimizer, step, losses, random numbers, place in the data
"""

import itertools
import math
import os
import signal
import threading
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vattn import _checks
from vattn.models.settings import number, require_path

Batch = TypeVar("Batch")
WARM = 0.05  # of the steps


def warmup_cosine(step: int, steps: int) -> float:
    """The share of the learning rate: linear over the first twentieth of the steps, then half a cosine to 0.

    Raises:
        TypeError, ValueError: `step` is no int of at least 0, or `steps` none of at least 1.

    Source:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017), section 3.

    Example:
        >>> [round(warmup_cosine(step, 100), 2) for step in (0, 4, 50, 99)]
        [0.2, 1.0, 0.5, 0.0]
    """
    _checks.integer("warmup_cosine", "step", step, least=0)
    _checks.integer("warmup_cosine", "steps", steps, least=1)
    warm = min(1.0, (step + 1) / (WARM * steps))
    return warm * (1 + math.cos(math.pi * step / steps)) / 2


class Training:
    """A model in training, which writes checkpoints and can be resumed from them.

    On a CPU a resumed training has the losses of an uninterrupted one bit for bit. The checkpoint holds the model, the
    optimizer, the step, the states of torch's generators (those of the CPU and of each GPU), and the position in the
    data, but not the random numbers of Python and NumPy. It is written to a file of its own, which then replaces the
    last checkpoint, and is read with ``weights_only=True``. Ctrl-C finishes the step, writes a checkpoint, and raises
    KeyboardInterrupt; a second Ctrl-C stops at once, and leaves the last checkpoint.

    Args:
        model: in training mode during :meth:`run`, and in evaluation mode after it.
        optimizer: of the model's parameters, with the peak learning rate of each group.
        path: where checkpoints are written; a missing folder is made.
        steps: the number of steps of the whole training.
        schedule: ``schedule(step, steps)`` is the factor of the learning rates in each step.
        max_norm: the largest norm of all gradients together, to which they are clipped; None for no clipping.
        save_every: steps between checkpoints. There is one at the end, too.
        generators: further generators to save, such as one that draws the data.
        name: the title of the progress bar.
        progress: show a progress bar.

    Attributes:
        step: the number of steps that are done.
        losses: the loss of each of these steps.

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "line.pt"
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> training = Training(model, optimizer, path, steps=100, progress=False)
        >>> training.resume()                                       # there is no checkpoint yet
        False
        >>> batches = torch.utils.data.DataLoader(torch.rand(32, 1), batch_size=8, shuffle=True)
        >>> training.run(batches, lambda x: (model(x) - 2 * x).square().mean())
        >>> training.step, training.losses[-1] < training.losses[0]
        (100, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        path: str | os.PathLike[str],
        *,
        steps: int,
        schedule: Callable[[int, int], float] = warmup_cosine,
        max_norm: float | None = 1.0,
        save_every: int = 100,
        generators: Sequence[torch.Generator] = (),
        name: str = "training",
        progress: bool = True,
    ) -> None:
        op = "Training"
        for what, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
            if not isinstance(value, kind):
                raise TypeError(f"{op}: {what} must be a torch {kind.__name__}, got {what}={type(value).__name__}")
        _checks.integer(op, "steps", steps, least=0)
        _checks.integer(op, "save_every", save_every, least=1)
        if not callable(schedule):
            raise TypeError(f"{op}: schedule must be a function of a step and of steps, got schedule={schedule!r}")
        if not isinstance(generators, Sequence):
            raise TypeError(f"{op}: generators must be a list or tuple, got generators={generators!r}")
        for i, generator in enumerate(generators):
            _checks.generator(op, f"generators[{i}]", generator)
        if max_norm is not None:
            number(op, "max_norm", max_norm, 0, above=True)
        self.model, self.optimizer, self.path, self.steps = model, optimizer, require_path(op, "path", path), steps
        self.schedule, self.max_norm, self.save_every, self.name = schedule, max_norm, save_every, name
        self.progress = progress
        self.step = 0
        self.losses: list[float] = []
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._generators = {f"given {i}": generator for i, generator in enumerate(generators)}
        self._epoch: dict[str, Any] = {}  # the random numbers at its beginning, and the count of batches since then

    def run(self, batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor], until: int | None = None) -> None:
        """Train up to step `until`, or to the last one, and write a checkpoint.

        Args:
            batches: a ``DataLoader``, or anything else that can be iterated over again and again, one epoch each time.
                To find its position in an epoch, a resumed training takes the batches before it once more and drops
                them. Or an endless iterator: what it yields may depend on the saved generators alone.
            loss_of: computes the loss of a batch, a tensor with one number. It moves the batch to the device.
            until: the step to stop at, as if the program had ended there; None for the last one.

        Raises:
            TypeError: `until` is no int.
            ValueError: an iterator ended, an iterable is empty, or a loss is not finite. The last checkpoint stays.
            KeyboardInterrupt: Ctrl-C was pressed. The checkpoint is that of the step that it finished.
        """
        if until is not None:
            _checks.integer("Training.run", "until", until, least=0)
        end = self.steps if until is None else min(until, self.steps)
        self.model.train()
        with (
            _Interrupt() as interrupt,
            tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", disable=not self.progress) as bar,
        ):
            if isinstance(batches, Iterator):
                self._epoch = {}
            ahead = batches if isinstance(batches, Iterator) else self._epochs(batches)
            while self.step < end:
                self._take_step(self._next(ahead), loss_of)
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if self.step % self.save_every == 0 or self.step == end or interrupt.asked:
                    self.save()
                if interrupt.asked:
                    raise KeyboardInterrupt
        self.model.eval()

    def _take_step(self, batch: Any, loss_of: Callable[[Any], Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule(self.step, self.steps)
        loss = loss_of(batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"Training.run: losses must be finite, got loss={value} in step {self.step}")
        self.losses.append(value)
        self.step += 1

    def _next(self, ahead: Iterator[Batch]) -> Batch:
        try:
            return next(ahead)
        except StopIteration:
            raise ValueError(
                f"Training.run: batches must be endless if it is an iterator, got the last one before step {self.step}"
            ) from None

    def _epochs(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches from here on, epoch after epoch."""
        iterator: Iterator[Batch] = iter(())
        if self._epoch:
            now = self._random()
            self._set_random(self._epoch["random"])
            iterator = iter(batches)
            for _ in itertools.islice(iterator, self._epoch["count"]):
                pass
            self._set_random(now)
        while True:
            for batch in iterator:
                self._epoch["count"] += 1
                yield batch
            if self._epoch and self._epoch["count"] == 0:
                raise ValueError("Training.run: batches must yield at least one batch, got none")
            self._epoch = {"random": self._random(), "count": 0}
            iterator = iter(batches)

    def save(self) -> None:
        """Write a checkpoint; if that is interrupted, the last one stays as it was."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "random": self._random(),
            "epoch": self._epoch,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a machine that stops could leave the new name with no content
        os.replace(unfinished, self.path)

    def resume(self) -> bool:
        """Load the checkpoint, if there is one; returns whether there is.

        Raises:
            ValueError: the file is no checkpoint of a Training, is damaged, or has other generators.
            RuntimeError: PyTorch's own, if model or optimizer are others.
        """
        if not self.path.exists():
            return False
        try:
            damaged = zipfile.ZipFile(self.path).testzip()  # torch.load does not look at checksums
            if damaged is not None:
                raise ValueError(f"{damaged} in it is damaged")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            parts = [state[key] for key in ("model", "optimizer", "step", "losses", "random", "epoch")]
        except Exception as error:
            raise ValueError(
                f"Training.resume: path must be a checkpoint of Training, got path={self.path} ({error})"
            ) from error
        model, optimizer, step, losses, random, epoch = parts
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self._set_random(random)
        self.step, self.losses, self._epoch = step, losses, epoch
        return True

    def _all_generators(self) -> dict[str, torch.Generator]:
        devices = [torch.default_generator, *torch.cuda.default_generators]
        return {str(generator.device): generator for generator in devices} | self._generators

    def _random(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self._all_generators().items()}

    def _set_random(self, states: dict[str, Tensor]) -> None:
        given = [name for name in states if name.startswith("given ")]
        if given != [*self._generators]:
            raise ValueError(
                f"Training.resume: generators must be as many as in the checkpoint, {len(given)}, "
                f"got len(generators)={len(self._generators)}"
            )
        for name, generator in self._all_generators().items():
            if name in states:  # the checkpoint may be that of a machine without this GPU
                generator.set_state(states[name])


class _Interrupt:
    """While it is entered, the first Ctrl-C is only noted; the second one is as ever."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Interrupt":
        self._before = signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()  # others cannot change it
        self._notes = is_main and callable(self._before)  # and if it is ignored, it stays so
        if self._notes:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._notes:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
