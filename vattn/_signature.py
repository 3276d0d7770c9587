"""What the arguments of an op must be, as a short text for each; calls are checked before kernels are launched.

The public functions check what a person gets wrong. But ``torch.ops.vattn`` can be called without them: from a program
that was exported, or with saved tensors that hooks have changed. What a tensor must be, as words::

    "B H L D"                 these axes, D being a head dim; one that is named twice has one size. The dtype is that
                              of the first tensor
    "... D", "B H ... D"      any axes there; "...", in a sum: their product
    "G+N"                     an axis that is a sum; "B*H+N", one of products of axes that are known
    "B H Lk[] D"              in a list: an axis that each of its tensors has for itself; "Lk[]", elsewhere: their sum
    "B K: int64"              another dtype; "int" is int32 or int64
    "N | B N: int64"          either

and what a number must be: "G", the size of an axis, ">= 1", "finite", or "0 .. 1", also "0 .. N".
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn._checks import MAX_HEAD_DIM

DTYPES = {
    "": (torch.float32, torch.bfloat16, torch.float16),
    "float32": (torch.float32,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "int": (torch.int32, torch.int64),
}
MOST_LOOKS = 1024  # of one op, remembered


class Signature:
    """The words for each argument of op `name`, whose `kinds` are those of its schema.

    Args:
        also: of the arguments by their names: raises where they do not fit each other in ways that have no words.
    """

    def __init__(
        self, name: str, kinds: Mapping[str, str], words: Mapping[str, str], also: Callable[..., None] | None = None
    ) -> None:
        self.name, self.also = name, also
        self.tensors = {x: words[x] for x, kind in kinds.items() if kind.startswith("Tensor")}
        self.numbers = {x: words[x] for x, kind in kinds.items() if not kind.startswith("Tensor") and kind != "bool"}
        self.optional = {x for x, kind in kinds.items() if kind == "Tensor?"}
        self._right: set[Any] = set()  # how calls looked that were found right: most look like one before

    def check(self, args: Mapping[str, Any]) -> None:
        """Raise unless `args`, by their names, are what the op takes."""
        look = tuple(map(_look, args.values()))
        if look in self._right:
            return
        self._check(args)
        if len(self._right) >= MOST_LOOKS:
            self._right.clear()
        self._right.add(look)

    def _check(self, args: Mapping[str, Any]) -> None:
        sizes = {word: args[x] for x, word in self.numbers.items() if word.isalpha() and word != "finite"}
        lists = [len(args[x]) for x in self.tensors if isinstance(args[x], (list, tuple))]
        for x, words in self.tensors.items():
            if not isinstance(args[x], (list, tuple)):
                if args[x] is not None or x not in self.optional:
                    self._check_tensor(x, args[x], words, "", sizes, args)
                continue
            count = max(1, *lists)
            self._require(len(args[x]) == count, x, f"have {count} elements", f"{len(args[x])} of them")
            for i, element in enumerate(args[x]):
                self._check_tensor(f"{x}[{i}]", element, words, str(i), sizes, args)
        for x, word in self.numbers.items():
            least, _, most = word.removeprefix(">= ").partition(" .. ") if word not in sizes else ("0", "", "")
            for value in args[x] if isinstance(args[x], (list, tuple)) else [args[x]]:
                inside = math.isfinite(value) if word == "finite" else value >= int(least)
                inside = inside and (not most or value <= (sizes[most] if most in sizes else int(most)))
                self._require(inside, x, f"be {'>= 0' if word in sizes else word}", value)
        head_dim = sizes.get("D", 1)
        self._require(1 <= head_dim <= MAX_HEAD_DIM, "head_dim", f"be between 1 and {MAX_HEAD_DIM}", head_dim)
        self._require(not args.get("dropout_p") or args["seed"] is not None, "seed", "be given for dropout", None)
        if self.also is not None:
            self.also(**args)

    def _require(self, holds: bool, name: str, must: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{self.name}: {name} must {must}, got {name}={got}")

    def _check_tensor(
        self, name: str, x: Any, words: str, element: str, sizes: dict[str, int], args: Mapping[str, Any]
    ) -> None:
        self._require(isinstance(x, Tensor), name, "be a tensor", x)
        first = args[next(iter(self.tensors))]
        first = first if isinstance(first, Tensor) else first[0]
        self._require(x.device == first.device, name, f"be on device {first.device}", x.device)
        axes, _, dtype = words.partition(":")
        count = max([1, *(len(args[x]) for x in self.tensors if isinstance(args[x], (list, tuple)))])
        fits = any(_fits(_numbered(some, element, count).split(), x.shape, sizes) for some in axes.split(" | "))
        self._require(fits, name, f"have shape ({axes}), where {sizes}", tuple(x.shape))
        allowed = DTYPES[dtype.strip()]
        if x.dtype not in allowed or (not dtype and x.dtype != first.dtype):
            must = first.dtype if not dtype and x is not first else " or ".join(map(str, allowed))
            raise TypeError(f"{self.name}: {name} must have dtype {must}, got {name}.dtype={x.dtype}")


def _look(x: Any) -> Any:
    """All of an argument that is checked."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return tuple(map(_look, x)) if isinstance(x, (list, tuple)) else x


def _numbered(axes: str, element: str, count: int) -> str:
    """`axes` with the number `element` for "[]"; without one, the sum over all of `count` elements."""
    if element:
        return axes.replace("[]", element)
    return re.sub(r"(\w+)\[\]", lambda axis: "+".join(f"{axis[1]}{i}" for i in range(count)), axes)


def _fits(axes: Sequence[str], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether `shape` has these axes. Those that had no size then have one."""
    if "..." in axes:
        at, count = axes.index("..."), sizes.setdefault("...", len(shape) - len(axes) + 1)
        axes = [*axes[:at], *(f"axis {i}" for i in range(count)), *axes[at + 1 :]]
    if len(axes) != len(shape):
        return False
    found: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True):
        unknown = []
        for part in axis.split("+"):
            factors = [_size(x, {**sizes, **found}) for x in part.split("*")]
            if None in factors:
                unknown.append(part)
            else:
                size -= math.prod(x for x in factors if x is not None)
        if unknown and size >= 0:
            found[unknown[0]] = size
        elif size != 0:
            return False
    sizes.update(found)
    return True


def _size(word: str, sizes: Mapping[str, int]) -> int | None:
    """Of an axis, or the product of any axes; None if it is not known."""
    if word == "...":
        return math.prod(sizes[f"axis {i}"] for i in range(sizes["..."]))
    return int(word) if word.isdigit() else sizes.get(word)
