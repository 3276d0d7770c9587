"""Forwards that activation checkpointing runs again, in backward, of layers that change with each forward.

    forward     z -> found, the layer moves           backward     z -> the same found, the layer stays

:func:`torch.utils.checkpoint.checkpoint` throws the activations of a part of a model away, and runs its forward once
more when backward needs them. A layer whose forward moves its statistics would move them twice, and its second run
would not find what its first one did.
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

KEPT = 4
"""Forwards without a graph of their own that are remembered: those of reentrant checkpointing, before a backward."""

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
    """One forward: its input, and what it found."""

    def __init__(self, z: Tensor, found: Any) -> None:
        self.z, self.found = z.detach(), found

    def held_by(self, output: Tensor) -> None:
        """Stay as long as autograd has the graph of an output."""
        output.register_hook(lambda gradient, run=self: None)


class Runs:
    """The forwards of a layer that may be run again. They are no part of its state: copies begin without any.

    One whose outputs have a graph is kept as long as that graph, and costs its input and what it found. Of others, the
    last few are kept, since the first run of ``checkpoint(..., use_reentrant=True)`` makes no graph.

    Args:
        op: for messages.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._held: weakref.WeakSet[Run] = weakref.WeakSet()
        self._last: collections.deque[Run] = collections.deque(maxlen=KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        return Runs, (self.op,)

    def add(self, run: Run, *outputs: Tensor) -> None:
        """Remember a forward with these outputs."""
        differentiable = [output for output in outputs if output.requires_grad]
        for output in differentiable:
            run.held_by(output)
        if differentiable:
            self._held.add(run)
        elif not torch.is_inference_mode_enabled():
            self._last.append(run)

    def find(self, z: Tensor) -> Any:
        """What the forward of `z` found when it ran first.

        Raises:
            RuntimeError: no forward is known whose input was like `z`.
        """
        norm = torch.linalg.vector_norm(_finite(z))
        nearest = min(self._distances(z), key=lambda pair: pair[0], default=None)
        if nearest is None or nearest[0] > CLOSE * float(norm):
            raise RuntimeError(
                f"{self.op}: a forward inside of a backward pass must be one that activation checkpointing runs again, "
                "with the same input (preserve_rng_state=True); with use_reentrant=True it must be one of the last "
                f"{KEPT}, got z.shape={tuple(z.shape)}"
            )
        return nearest[1].found

    def _distances(self, z: Tensor) -> Iterator[tuple[float, Run]]:
        for run in (*self._held, *self._last):
            if run.z.shape == z.shape and run.z.dtype == z.dtype and run.z.device == z.device:
                yield float(torch.linalg.vector_norm(_finite(z) - _finite(run.z))), run


def _finite(z: Tensor) -> Tensor:
    """`z` in float32 at least, its elements that are not finite being 0."""
    return torch.nan_to_num(z.detach().to(torch.promote_types(z.dtype, torch.float32)), 0.0, 0.0, 0.0)
