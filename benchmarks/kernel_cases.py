"""Every Triton kernel in every variant, called without a GPU: what :mod:`benchmarks.kernel_report` compiles.

A case calls the launchers of one operator with tensors that have no memory. :func:`offline` makes them choose the tile
sizes of an architecture, and hands over each kernel that they would have launched::

    with offline("sm90", launched):                       # launched(kernel, *arguments, **settings)
        OPERATORS[case.operator].call(case.variant, case.dtype, case.head_dim)
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: an interpreted kernel cannot be compiled

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vattn.kernels import (
    axial_attention,
    configs,
    edge_sparse_attention,
    latent_attention,
    launch,
    leap_attention,
    merge_attention,
    nearest_code,
    node_sparse_attention,
    periodic_shift,
    position_bias,
    token_importance,
)

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HEAD_DIMS = (64, 72, 80, 96, 120, 128, 144, 256)
WINDOW, TOKENS, BLOCK = (8, 14, 14), 8 * 14 * 14, 56  # SViTT's, at eight frames
HELPERS = ("merge_attention", "periodic_shift", "position_bias")  # launched by operators, but with cases of their own


class Operator(NamedTuple):
    """How the launchers of an operator are called, and in which variants."""

    call: Callable[[str, torch.dtype, int], Any]
    usual: tuple[str, ...]  # at all of `head_dims`
    others: tuple[str, ...] = ()  # at two of them
    head_dims: tuple[int, ...] = HEAD_DIMS


class Case(NamedTuple):
    """A call of the launchers of an operator."""

    operator: str
    variant: str
    dtype: torch.dtype
    head_dim: int


class Offline:
    """Stands for the driver of a GPU that is not there; enough of it to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextlib.contextmanager
def offline(architecture: str, launched: Callable[..., None]) -> Iterator[None]:
    """Launchers choose tiles for `architecture`, and call ``launched(kernel, *args, **settings)`` instead of it."""

    def instead(function: Any, programs: int, like: torch.Tensor, *args: Any, **settings: Any) -> None:
        launched(function, *args, grid=(programs,), **settings, **launch.OPTIONS)

    with (
        mock.patch.object(launch, "launch", instead),
        mock.patch.object(configs, "architecture", lambda device: architecture),
        mock.patch.object(torch.version, "hip", "offline" if TARGETS[architecture].backend == "hip" else None),
    ):
        driver.set_active(Offline(TARGETS[architecture]))
        yield


def operator_of(function: Any, calling: str) -> str:
    """Whose kernel it is that the launchers of the operator `calling` launch: theirs, or that of a helper.

    The loops over tiles are one set of kernels for several operators, so that their module says nothing.
    """
    module = function.fn.__module__.split(".")[-1]
    return module if module in HELPERS else calling


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def dropout(variant: str, query: Tensor, keys: int | None = None) -> tuple[float, Tensor | None]:
    """Probability and seed, with the "numbers" of batches and heads, and of as many queries and `keys` as there are."""
    B, H, *rows, _ = query.shape
    queries = math.prod(rows)
    numbers = B * H + queries + (queries if keys is None else keys) if "numbers" in variant else 0
    return (0.1, empty(1 + numbers, dtype=torch.int64)) if "dropout" in variant else (0.0, None)


def bias_of_window(variant: str, heads: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """The table, with one global token, and the window."""
    if "bias" not in variant:
        return None, ()
    return empty(math.prod(2 * size - 1 for size in WINDOW) + 3, heads), WINDOW


def axial(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """Lines are "short", and share tiles, or "long"."""
    query = empty(2, 2, 4, 512 if "long" in variant else 8, 64, head_dim, dtype=dtype)
    lse, settings = empty(*query.shape[:-1]), (1, *dropout(variant, query), 0.1)
    axial_attention.forward(query, query, query, *settings)
    axial_attention.backward(query, None, query, query, query, query, lse, *settings)
    axial_attention.jvp(*[query] * 7, lse, *settings)


def edge_sparse(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """With a global token. The gradient of a bias is deterministic where there is dropout too."""
    query, columns = empty(2, 4, 1 + TOKENS, head_dim, dtype=dtype), empty(4 * TOKENS // BLOCK, dtype=torch.int32)
    samples = [2] if "samples" in variant else []
    layout, lse = (empty(*samples, 1, TOKENS // BLOCK + 1, dtype=torch.int32), columns), empty(*query.shape[:-1])
    order = empty(TOKENS, dtype=torch.int32) if "order" in variant else None
    table, window = bias_of_window(variant, 4)
    settings = (order, BLOCK, 1, table, window, None, "causal" in variant, *dropout(variant, query), 0.1)
    edge_sparse_attention.forward(query, query, query, *layout, *layout, *settings, "dropout" in variant)
    edge_sparse_attention.backward(
        query, None, *[query] * 4, lse, *layout, *layout, *settings, False, deterministic="dropout" in variant
    )
    edge_sparse_attention.jvp(*[query] * 3, table, *[query] * 4, lse, *layout, None, None, *settings, False)


def latent(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """Split ("encode") or not, over "2 segments", or with "key lengths". The keys of "decode" are one tile."""
    queries, keys = (128, 8192) if variant == "encode" else (8192, 255) if "decode" in variant else (1024, 1024)
    query, key = (empty(2, 1, length, head_dim, dtype=dtype) for length in (queries, keys))
    # An empty segment is one more in the loops over segments, and launches no kernel of its own.
    segments = [key, key[:, :, :0]] if "2 segments" in variant else [key]
    lengths = empty(2, dtype=torch.int64) if variant == "key lengths" else None
    lse, settings = empty(*query.shape[:-1]), (lengths, *dropout(variant, query, keys), 0.1)
    latent_attention.forward(query, segments, segments, *settings)
    latent_attention.backward(query, None, query, segments, segments, query, lse, *settings)
    latent_attention.jvp(query, segments, segments, query, segments, segments, query, lse, *settings)


def node_sparse(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """Half of the keys are kept, or, with "lengths", fewer."""
    query, kept = empty(2, 4, 1024, head_dim, dtype=dtype), empty(2, 512, dtype=torch.int64)
    lengths = empty(2, dtype=torch.int64) if "lengths" in variant else None
    lse, settings = empty(*query.shape[:-1]), (kept, lengths, *dropout(variant, query), 0.1)
    node_sparse_attention.forward(query, query, query, *settings)
    node_sparse_attention.backward(query, None, query, query, query, query, lse, *settings)
    node_sparse_attention.jvp(*[query] * 7, lse, *settings)


def leap(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """With or without the "shift" of channels."""
    query = empty(2, 8, 8, 197, head_dim, dtype=dtype)
    lse, settings = empty(*query.shape[:-1]), (4, 2, 4 if "shift" in variant else 0, *dropout(variant, query), 0.1)
    leap_attention.forward(query, query, query, *settings)
    leap_attention.backward(query, None, query, query, query, query, lse, *settings)
    leap_attention.jvp(*[query] * 7, lse, *settings)


def merge(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """The variant says how many parts."""
    out, lse, parts = empty(2, 8, 1024, head_dim, dtype=dtype), empty(2, 8, 1024), int(variant.split()[0])
    merge_attention.forward([out] * parts, [lse] * parts)
    merge_attention.backward(out, None, [out] * parts, [lse] * parts, out, lse)
    merge_attention.jvp([out] * parts, [lse] * parts, [out] * parts, [lse] * parts, out, lse)


def importance(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    query = empty(2, 4, 1 + TOKENS, head_dim, dtype=dtype)
    token_importance.forward(query, query, *bias_of_window(variant, 4), 1, None, None, None, 0.1)


def nearest(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    nearest_code.forward(*(empty(rows, head_dim, dtype=dtype) for rows in (32768, 2048)))


def shift(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    periodic_shift.forward(empty(2, 8, 8, 197, head_dim, dtype=dtype), 4, variant == "transpose")


def codes(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    position_bias.codes(WINDOW, None, TOKENS, empty(1))


OPERATORS = {
    "axial_attention": Operator(
        axial, ("short", "long"), ("short+dropout", "long+dropout", "short+dropout+numbers", "long+dropout+numbers")
    ),
    "edge_sparse_attention": Operator(
        edge_sparse,
        ("bias",),
        (
            *("plain", "causal", "samples", "order", "bias+causal+dropout", "bias+causal+dropout+numbers"),
            "bias+causal+dropout+order",
        ),
    ),
    "latent_attention": Operator(
        latent,
        ("2 segments", "decode"),
        ("encode", "dropout", "key lengths", "decode+2 segments+dropout", "decode+2 segments+dropout+numbers"),
    ),
    "leap_attention": Operator(leap, ("shift",), ("plain", "shift+dropout", "shift+dropout+numbers")),
    "merge_attention": Operator(merge, ("2 parts", "8 parts"), head_dims=(64,)),
    "nearest_code": Operator(nearest, ("",), head_dims=(64,)),
    "node_sparse_attention": Operator(node_sparse, ("plain",), ("dropout", "lengths+dropout+numbers")),
    "periodic_shift": Operator(shift, ("plain", "transpose"), head_dims=(64,)),
    "position_bias": Operator(codes, ("",), head_dims=(64,)),
    "token_importance": Operator(importance, ("bias",), ("plain",)),
}


def cases(name: str) -> list[Case]:
    """Those of an operator: its usual variants at all head dims and in all dtypes, and the others at two head dims."""
    _, usual, others, head_dims = OPERATORS[name]
    return [
        *(Case(name, variant, torch.bfloat16, head_dim) for variant in usual for head_dim in head_dims),
        *(Case(name, variant, torch.bfloat16, head_dim) for variant in others for head_dim in (64, 128)),
        *(Case(name, variant, dtype, 64) for variant in usual for dtype in (torch.float16, torch.float32)),
    ]
