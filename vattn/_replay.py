"""Replays the launches of a kernel for calls with the same shapes, strides, dtypes and settings.

A launcher works out sizes, strides, tiles and splits, for tens of microseconds, from nothing but how its arguments
look: shapes, strides, dtypes, devices, alignment, and numbers. The second call of a look is recorded, as results that
are allocated, kernels that are launched, and operators of PyTorch between them; later ones are replayed::

    look -> [out = empty_strided(..), lse = empty_strided(..), kernel(.., query, key, value, out, lse, ..)] -> out, lse

Lengths that change with every call are not worth a recording, hence the second one. VATTN_REPLAY=0 turns this off.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vattn._looks import MOST_LOOKS

Slots = list[Any]  # the tensors of a call: its arguments first, then what it makes
ALIGNMENT = 16  # bytes that a kernel may load at once
EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_recordings = threading.local()  # the autograd engine has threads of its own


class Replayed:
    """`launcher`, a function of tensors, lists of tensors and numbers, which runs at most twice for each look of them.

    Args:
        check: of the arguments, in front of the first call of a look.
    """

    def __init__(self, launcher: Callable[..., Any], check: Callable[..., None]) -> None:
        self.launcher, self.check = launcher, check
        self._replays: dict[Any, Callable[[Slots], Any]] = {}
        self._others: dict[Any, bool] = {}  # that were seen; whether their recording could not be replayed

    def __call__(self, *args: Any) -> Any:
        # All that a launcher goes by.
        look: list[Any] = [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            torch.backends.cuda.matmul.fp32_precision,
        ]
        tensors: list[Tensor] = []
        _look_at(args, look, tensors)
        key = tuple(look)
        replay = self._replays.get(key)
        if replay is not None:
            return replay(tensors)
        vain = self._others.get(key)
        if vain is None:
            self.check(*args)
            self._remember(self._others, key, False)
        if vain is not False:
            return self.launcher(*args)
        own, own_tensors = _distinct(args)
        with Recording(own_tensors) as recording:
            results = self.launcher(*own)
        replay = recording.finish(results)
        if replay is None:
            self._others[key] = True
        else:
            self._remember(self._replays, key, replay)
        return results

    @staticmethod
    def _remember(found: dict[Any, Any], key: Any, value: Any) -> None:
        if len(found) >= MOST_LOOKS:
            found.clear()
        found[key] = value


def _look_at(args: Sequence[Any], look: list[Any], tensors: list[Tensor]) -> None:
    for x in args:
        if isinstance(x, Tensor):
            look += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT)
            tensors.append(x)
        elif isinstance(x, (list, tuple)):
            look.append(len(x))
            _look_at(x, look, tensors)
        else:
            look.append(x)


def _distinct(args: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """`args` with tensors of their own, which are flat besides: one that is given twice is not so in every call."""
    tensors: list[Tensor] = []

    def own(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(own(y) for y in x)
        if isinstance(x, Tensor):
            tensors.append(torch.ops.aten.alias(x))
            return tensors[-1]
        return x

    return [own(x) for x in args], tensors


def _flat(args: Sequence[Any]) -> list[Tensor]:
    return [y for x in args for y in (_flat(x) if isinstance(x, (list, tuple)) else (x,)) if isinstance(y, Tensor)]


def note_launch(run: Callable[..., None] | None, args: Sequence[Any]) -> None:
    """Add a kernel launch ``run(*args)`` to the recording, if there is one; None cannot be replayed."""
    recording = getattr(_recordings, "now", None)
    if recording is not None:
        recording.launched(run, args)


@dataclasses.dataclass
class _Step:
    """One thing that was done. Tensors are numbers of slots."""

    kind: str  # "empty", "view", "makes" or "writes", by an operator of PyTorch; or "launch"
    reads: set[int]
    makes: list[int]
    run: Callable[[Slots], None] = lambda slots: None  # does it to the slots of another call


class Recording(TorchDispatchMode):
    """What is done while it is entered, by calls of PyTorch's operators and by kernels."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = len(given)
        self.tensors: list[Tensor] = []  # which stay alive, so that nothing else has their ids
        self.slots: dict[int, int] = {}  # by id
        self.bases: dict[int, int] = {}  # of views
        self.steps: list[_Step] | None = []  # None: it cannot be replayed
        for x in given:
            self._add(x)

    def __enter__(self) -> "Recording":
        self.outer: Recording | None = getattr(_recordings, "now", None)
        if self.outer is not None:
            self.outer.steps = None  # what is done in here, it does not see
        _recordings.now = self
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        _recordings.now = self.outer
        super().__exit__(*reason)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if self.steps is None or not (result is None or _flat([result])) or VALUES.intersection(op.tags):
            self.steps = None  # what depends on the values in a tensor is not the same in the next call
            return result
        names, given = list(kwargs), (args, list(kwargs.values()))
        if not self._knows(given):
            return result
        fill, reads = self._filled(given, self._alike)
        makes = [self._add(x) for x in _flat([result])]
        if not op._schema.is_mutable and reads.issuperset(makes) and makes:
            return result  # what is so already
        returns = op._schema.returns
        if op in EMPTY:
            self.steps.append(_Step("empty", set(), makes))
            return result
        if op._schema.is_mutable or not makes:
            kind = "writes"
        elif returns[0].alias_info is None:
            kind = "makes"
        else:
            kind = "view"
            self.bases |= dict.fromkeys(makes, self.slots[id(_flat(args)[0])])

        def run(slots: Slots) -> None:
            args, values = fill(slots)
            made = op(*args, **dict(zip(names, values, strict=True))) if names else op(*args)
            if isinstance(made, Tensor):
                slots[makes[0]] = made
                return
            for i, x in zip(makes, made or (), strict=True):
                slots[i] = x

        self.steps.append(_Step(kind, reads, makes, run))
        return result

    def launched(self, run: Callable[..., None] | None, args: Sequence[Any]) -> None:
        """A kernel runs: of a tensor it takes the address and the dtype."""
        if run is None:
            self.steps = None
        if self.steps is None or run is None or not self._knows(args):
            return
        fill, reads = self._filled(args, self._start)

        self.steps.append(_Step("launch", reads, [], functools.partial(_run_filled, run, fill)))

    def finish(self, results: Any) -> Callable[[list[Tensor]], Any] | None:
        """A function that repeats this for the tensors of another call that looks the same, or None."""
        if self.steps is None or not self._knows([results]):
            return None
        fill, kept = self._filled([results], self._alike)
        steps = self._needed(kept)
        self._fuse(steps, kept)
        used, program = set(range(self.given)) | kept, []
        for step in reversed(steps):
            touched = {*step.reads, *step.makes}
            program.append((step.run, sorted(touched - used)))  # and what is not used later is let go
            used |= touched
        program.reverse()
        blank = [None] * (len(self.tensors) - self.given)
        self.tensors.clear()

        def replay(given: list[Tensor]) -> Any:
            slots: Slots = given + blank
            for run, done in program:
                run(slots)
                for i in done:
                    slots[i] = None
            return fill(slots)[0]

        return replay

    def _needed(self, kept: set[int]) -> list[_Step]:
        """The steps without which something else would be `kept`, or be written."""
        needed, steps = set(kept), []
        for step in reversed(self.steps or []):
            if step.kind in ("launch", "writes") or not needed.isdisjoint(step.makes):
                needed |= step.reads
                steps.append(step)
        return steps[::-1]

    def _fuse(self, steps: list[_Step], kept: set[int]) -> None:
        """Memory is laid out at once as the only view of it that is wanted; kernels do not ask how it lies."""
        for step in [x for x in steps if x.kind == "empty"]:
            while (view := self._only_view(steps, step.makes[-1], kept)) is not None:
                step.makes += view.makes
                steps.remove(view)
            step.run = _allocation(self.tensors[step.makes[-1]], step.makes)

    def _only_view(self, steps: list[_Step], place: int, kept: set[int]) -> _Step | None:
        """What makes a view of all that is at `place`, if nothing else asks for that but kernels."""
        readers = [x for x in steps if x.kind != "launch" and place in x.reads]
        if place in kept or len(readers) != 1 or readers[0].kind != "view" or len(readers[0].makes) != 1:
            return None
        whole, view = self.tensors[place], self.tensors[readers[0].makes[0]]
        return readers[0] if _start_of(whole) == _start_of(view) and whole.numel() == view.numel() else None

    def _knows(self, args: Any) -> bool:
        """Whether tensors come from this call; if not, as of those that somebody keeps, nothing is replayed."""
        if any(id(x) not in self.slots for x in _flat(args)):
            self.steps = None
        return self.steps is not None

    def _add(self, x: Tensor) -> int:
        if id(x) not in self.slots:
            self.slots[id(x)] = len(self.tensors)
            self.tensors.append(x)
        return self.slots[id(x)]

    def _alike(self, x: Tensor) -> int:
        """The slot of `x`, or of its base, if that has the same layout."""
        return self._first(x, lambda y: (_start_of(y), y.shape, y.stride()))

    def _start(self, x: Tensor) -> int:
        """The slot of `x`, or of what it is a view of, if this begins at the same number."""
        return self._first(x, _start_of)

    def _first(self, x: Tensor, of: Callable[[Tensor], Any]) -> int:
        found = i = self.slots[id(x)]
        while i in self.bases:
            i = self.bases[i]
            if of(self.tensors[i]) == of(x):
                found = i
        return found

    def _filled(self, args: Any, slot: Callable[[Tensor], int]) -> tuple[Callable[[Slots], Any], set[int]]:
        """A function of slots: `args` with those of another call in the place of tensors. And which slots it reads."""
        kind, template, reads = type(args), list(args), set()
        tensors: list[tuple[int, int]] = []
        inner: list[tuple[int, Callable[[Slots], Any]]] = []
        for i, x in enumerate(template):
            if isinstance(x, Tensor):
                tensors.append((i, slot(x)))
                reads.add(slot(x))
                template[i] = None  # or it would stay alive
            elif isinstance(x, (list, tuple)) and _flat(x):
                element, more = self._filled(x, slot)
                inner.append((i, element))
                reads |= more
                template[i] = None

        def fill(slots: Slots) -> Any:
            filled = template.copy()
            for i, place in tensors:
                filled[i] = slots[place]
            for i, element in inner:
                filled[i] = element(slots)
            return filled if kind is list else tuple(filled) if kind is tuple else kind(*filled)

        return fill, reads


def _run_filled(run: Callable[..., None], fill: Callable[[Slots], Any], slots: Slots) -> None:
    run(*fill(slots))


def _start_of(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype


def _allocation(like: Tensor, makes: list[int]) -> Callable[[Slots], None]:
    size, steps, dtype, device = like.shape, like.stride(), like.dtype, like.device

    def run(slots: Slots) -> None:
        x = torch.empty_strided(size, steps, dtype=dtype, device=device)
        for i in makes:
            slots[i] = x

    return run
