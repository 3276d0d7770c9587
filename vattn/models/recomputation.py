"""Forwards that activation checkpointing runs again, in backward, of layers that change with each forward.

    forward     z -> found, the layer moves           backward     z -> the same found, the layer stays

:func:`torch.utils.checkpoint.checkpoint` throws the activations of a part of a model away, and runs its forward once
more when backward needs them. A layer whose forward updates statistics would update them twice, and its second run
would not compute the same.
"""

import collections
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

KEPT = 16
"""Forwards without a graph of their own that are remembered, before a backward."""

CLOSE = 1e-2
"""How far inputs of the two runs may differ, relative to their norm: kernels may round otherwise."""


def in_backward() -> bool:
    """Whether autograd is in a backward pass, in this thread: not while PyTorch compiles, which repeats no effects."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Operators inside are no part of what selective checkpointing counts, and expects again in the second run."""
    seers = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    is_selective = not torch.compiler.is_compiling() and any(
        isinstance(mode, seers) for mode in _get_current_dispatch_mode_stack()
    )
    with _disable_current_modes() if is_selective else contextlib.nullcontext():
        yield


class Run:
    """One forward: its input, the state of PyTorch's generator when it began, and what it found."""

    def __init__(self, z: Tensor, state: Tensor, found: Any) -> None:
        self.z, self.state, self.found = z.detach(), state, found
        self.number, self.times_found = 0, 0

    def held_by(self, output: Tensor) -> None:
        """Stay as long as autograd has the graph of an output."""
        output.register_hook(lambda gradient, run=self: None)

    def is_close_to(self, z: Tensor) -> bool:
        """Whether `z` may be its input, of the same kind, rounded otherwise."""
        if (self.z.shape, self.z.dtype, self.z.device) != (z.shape, z.dtype, z.device):
            return False
        own, other = _finite(self.z), _finite(z)
        return bool(torch.linalg.vector_norm(own - other) <= CLOSE * torch.linalg.vector_norm(other))


class Runs:
    """The forwards of a layer that may be run again. They are no part of its state: copies begin without any.

    One whose outputs have a graph is kept as long as that graph, and costs its input and what it found. The first run
    of ``checkpoint(..., use_reentrant=True)`` makes no graph, nor does one of an input without gradient; of such runs
    inside a checkpoint, the last few are kept.

    Args:
        op: for messages.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._count = 0
        self._held: weakref.WeakSet[Run] = weakref.WeakSet()
        self._last: collections.deque[Run] = collections.deque(maxlen=KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        return Runs, (self.op,)

    def add(self, run: Run, *outputs: Tensor) -> None:
        """Remember a forward with these outputs."""
        self._count += 1
        run.number = self._count
        differentiable = [output for output in outputs if output.requires_grad]
        for output in differentiable:
            run.held_by(output)
        if differentiable:
            self._held.add(run)
        elif _in_checkpoint():
            self._last.append(run)

    def find(self, z: Tensor, state: Tensor) -> Any:
        """What the forward of `z` found when it ran first, with PyTorch's generator in the same state.

        Checkpointing winds the generator back, which tells forwards of equal inputs apart. Where it does not, they are
        taken in the order of a backward: the last one first, and each once before any is taken again.

        Raises:
            RuntimeError: no forward is known whose input was like `z`.
        """

        def order(run: Run) -> tuple[bool, int, int]:
            return not torch.equal(run.state, state), run.times_found, -run.number

        for run in sorted((*self._held, *self._last), key=order):
            if run.is_close_to(z):
                run.times_found += 1
                return run.found
        raise RuntimeError(
            f"{self.op}: a forward inside of a backward pass must be one that activation checkpointing runs again, "
            f"with the same input; of those whose outputs have no graph, the last {KEPT} are remembered, and of others "
            f"those whose outputs are in use, got z.shape={tuple(z.shape)}"
        )


def _in_checkpoint() -> bool:
    """Whether it looks like the first run of a checkpoint: one of either kind has no gradients, or hooks."""
    if torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _finite(z: Tensor) -> Tensor:
    """`z` in float32 at least, its elements that are not finite being 0."""
    return torch.nan_to_num(z.detach().to(torch.promote_types(z.dtype, torch.float32)), 0.0, 0.0, 0.0)
