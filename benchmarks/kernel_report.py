"""What the compiler makes of every Triton kernel, without a GPU.

``python benchmarks/kernel_report.py`` calls each launcher with tensors that have no memory, and compiles what it
would have launched, with the tile sizes of the table, for every architecture: registers of a thread, bytes
spilled, shared memory, and how many matrix instructions. It prints a table, stores JSON lines, and fails where a
kernel breaks a bound of :func:`violations`. ``--operators``, ``--architectures`` and ``--head-dims`` choose some, whose
lines take the place of those that are stored.
"""

import argparse
import collections
import contextlib
import datetime
import io
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: an interpreted kernel cannot be compiled

import torch
import triton
from torch import Tensor
from triton import knobs
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
    periodic_shift,
    position_bias,
    token_importance,
)

RESULTS = pathlib.Path(__file__).parent / "results" / "kernel_report.jsonl"

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one program may use. Those of compute capability 8.6, which shares the table with 8.0, are 99 KiB.
SHARED_MEMORY = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
}
# The kernels on the online-softmax core. A program that owns 64 rows wants the matrix instructions of its architecture
# that take so many at once; one of fewer, such as the global tokens, cannot have them.
FLASH = ("axial_attention", "edge_sparse_attention", "latent_attention", "leap_attention", "token_importance")
WIDE_INSTRUCTION = {"sm90": "wgmma", "sm100": "tcgen05"}
WIDE_ROWS = 64
HEAD_DIMS = (64, 72, 80, 96, 120, 128, 144, 256)
WINDOW, TOKENS, BLOCK = (8, 14, 14), 8 * 14 * 14, 56  # SViTT's, at eight frames


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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def dropout(variant: str) -> tuple[float, Tensor | None]:
    """Probability and seed."""
    return (0.1, empty(1, dtype=torch.int64)) if "dropout" in variant else (0.0, None)


def bias_of_window(variant: str, heads: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """The table, with one global token, and the window."""
    if "bias" not in variant:
        return None, ()
    return empty(math.prod(2 * size - 1 for size in WINDOW) + 3, heads), WINDOW


def axial(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """Lines are "short", and share tiles, or "long"."""
    query = empty(2, 2, 4, 512 if "long" in variant else 8, 64, head_dim, dtype=dtype)
    lse, settings = empty(*query.shape[:-1]), (*dropout(variant), 0.1)
    axial_attention.forward(query, query, query, *settings)
    axial_attention.backward(query, None, query, query, query, query, lse, *settings)


def edge_sparse(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """With a global token. The gradient of a bias is deterministic where there is dropout too."""
    query, columns = empty(2, 4, 1 + TOKENS, head_dim, dtype=dtype), empty(4 * TOKENS // BLOCK, dtype=torch.int32)
    offsets, lse = empty(1, TOKENS // BLOCK + 1, dtype=torch.int32), empty(*query.shape[:-1])
    settings = (
        offsets, columns, offsets, columns, BLOCK, 1, *bias_of_window(variant, 4), None, "causal" in variant,
        *dropout(variant), 0.1, "dropout" in variant,
    )  # fmt: skip
    edge_sparse_attention.forward(query, query, query, *settings)
    edge_sparse_attention.backward(query, None, query, query, query, query, lse, *settings)


def latent(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """Split ("encode") or not, over "2 segments", with "key lengths", or of node-sparse attention ("kept" keys).

    The keys of "decode" are one tile.
    """
    queries, keys = (128, 8192) if variant == "encode" else (8192, 255) if "decode" in variant else (1024, 1024)
    query, key = (empty(2, 1, length, head_dim, dtype=dtype) for length in (queries, keys))
    # An empty segment is one more in the loops over segments, and launches no kernel of its own.
    segments = [key, key[:, :, :0]] if "2 segments" in variant else [key]
    lengths = empty(2, dtype=torch.int64) if variant == "key lengths" else None
    kept = empty(2, 512, dtype=torch.int64) if variant == "kept" else None
    lse, settings = empty(*query.shape[:-1]), (lengths, *dropout(variant), 0.1, kept)
    latent_attention.forward(query, segments, segments, *settings)
    latent_attention.backward(query, None, query, segments, segments, query, lse, *settings)


def leap(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """With or without the "shift" of channels."""
    query = empty(2, 8, 8, 197, head_dim, dtype=dtype)
    lse, settings = empty(*query.shape[:-1]), (4, 2, 4 if "shift" in variant else 0, *dropout(variant), 0.1)
    leap_attention.forward(query, query, query, *settings)
    leap_attention.backward(query, None, query, query, query, query, lse, *settings)


def merge(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    """The variant says how many parts."""
    out, lse, parts = empty(2, 8, 1024, head_dim, dtype=dtype), empty(2, 8, 1024), int(variant.split()[0])
    merge_attention.forward([out] * parts, [lse] * parts)
    merge_attention.backward(out, None, [out] * parts, [lse] * parts, out, lse)


def importance(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    query = empty(2, 4, 1 + TOKENS, head_dim, dtype=dtype)
    token_importance.forward(query, query, *bias_of_window(variant, 4), 1, None, None, 0.1)


def nearest(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    nearest_code.forward(*(empty(rows, head_dim, dtype=dtype) for rows in (32768, 2048)))


def shift(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    periodic_shift.forward(empty(2, 8, 8, 197, head_dim, dtype=dtype), 4, variant == "transpose")


def codes(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    position_bias.codes(WINDOW, None, TOKENS, empty(1))


OPERATORS = {
    "axial_attention": Operator(axial, ("short", "long"), ("short+dropout", "long+dropout")),
    "edge_sparse_attention": Operator(edge_sparse, ("bias",), ("plain", "causal", "bias+causal+dropout")),
    "latent_attention": Operator(
        latent, ("2 segments", "decode"), ("encode", "dropout", "key lengths", "kept", "decode+2 segments+dropout")
    ),
    "leap_attention": Operator(leap, ("shift",), ("plain", "shift+dropout")),
    "merge_attention": Operator(merge, ("2 parts", "8 parts"), head_dims=(64,)),
    "nearest_code": Operator(nearest, ("",), head_dims=(64,)),
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


def report(case: Case, architecture: str) -> list[dict[str, Any]]:
    """One row for each kernel of its own that `case` launches."""
    rows = []

    def compile_kernel(function: Any, *args: Any, **settings: Any) -> None:
        module = function.fn.__module__.split(".")[-1]
        if module != case.operator:  # which has cases of its own
            return
        function.device_caches.clear()  # or a kernel that another case has compiled would leave no log
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = function.warmup(*args, **settings)
        tiles = {name: settings[name] for name in configs.Tiles._fields if name in settings}
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "triton": triton.__version__,
                "architecture": architecture,
                "operator": module,
                "kernel": function.__name__.removesuffix("_kernel"),
                "variant": case.variant,
                "dtype": str(case.dtype).removeprefix("torch."),
                "head_dim": case.head_dim,
                **tiles,
                **_resources(compiled, log.getvalue()),
            }
        )

    # The register counts are in the log of the assembler, which a cached kernel has not.
    with (
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(knobs.compilation, "always_compile", True),
        offline(architecture, compile_kernel),
    ):
        OPERATORS[case.operator].call(case.variant, case.dtype, case.head_dim)
    return rows


def _resources(compiled: Any, log: str) -> dict[str, Any]:
    """Registers of a thread, bytes spilled by it, shared memory, and matrix instructions by name."""
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[-500:]}")
        return int(found[1])

    if "ptx" in compiled.asm:
        registers, spilled = number(r"Used (\d+) registers", log), number(r"(\d+) bytes spill stores", log)
    else:
        registers = number(r"\.vgpr_count: +(\d+)", assembly)
        spilled = 4 * number(r"\.vgpr_spill_count: +(\d+)", assembly)
    matrix = {name: len(re.findall(pattern, assembly)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": {name: count for name, count in matrix.items() if count},
    }


def violations(row: dict[str, Any]) -> list[str]:
    """The recorded bounds that a row breaks."""
    broken = []
    architecture = row["architecture"]
    if row["shared_bytes"] > SHARED_MEMORY[architecture]:
        broken.append(f"more than {SHARED_MEMORY[architecture]} bytes of shared memory")
    if row["dtype"] == "float32":
        return broken
    if architecture == "sm90" and row["head_dim"] <= 128 and row["spilled_bytes"] > 0:
        broken.append("spills")
    if row["operator"] in FLASH:
        if architecture in WIDE_INSTRUCTION and own_rows(row) >= WIDE_ROWS:
            if WIDE_INSTRUCTION[architecture] not in row["matrix_instructions"]:
                broken.append(f"no {WIDE_INSTRUCTION[architecture]}")
        elif not row["matrix_instructions"]:
            broken.append("no matrix instructions")
    return broken


def own_rows(row: dict[str, Any]) -> int:
    """Rows of the tile that a program of an attention kernel owns."""
    return row["BLOCK_K" if row["kernel"] in ("backward_key", "sum") else "BLOCK_Q"]


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    tiles = "x".join(str(row[name]) for name in ("BLOCK_Q", "BLOCK_K") if name in row)
    warps = row.get("num_warps", "")
    matrix = " ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
    return (
        f"{row['architecture']:7} {row['operator']:21} {row['kernel']:14} {row['variant']:25} {row['dtype']:8} "
        f"{row['head_dim']:4} {tiles:>8} {warps:>5} {row.get('num_stages', ''):>6} {row['registers']:>9} "
        f"{row['spilled_bytes']:>7} {row['shared_bytes']:>7} {matrix:12} {', '.join(violations(row))}"
    )


def store(path: pathlib.Path, rows: list[dict[str, Any]], chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Write `rows` to a file of JSON lines, in the place of the `chosen` ones in it."""
    known = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in known if not chosen(row)] + rows
    architectures, operators = list(TARGETS), list(OPERATORS)
    rows.sort(key=lambda row: (architectures.index(row["architecture"]), operators.index(row["operator"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and store; the exit status is 1 if a kernel breaks a bound."""
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and matrix instructions.")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="file of JSON lines; those not chosen stay")
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    options = parser.parse_args(arguments)

    def chosen(row: dict[str, Any]) -> bool:
        return (
            row["architecture"] in options.architectures
            and row["operator"] in options.operators
            and row["head_dim"] in options.head_dims
        )

    header = ("arch", "operator", "kernel", "variant", "dtype", "D", "tile", "warps", "stages", "registers", "spilled")
    layout = "{:7} {:21} {:14} {:25} {:8} {:>4} {:>8} {:>5} {:>6} {:>9} {:>7} {:>7} matrix instructions"
    print(layout.format(*header, "shared"))
    rows = []
    for architecture in options.architectures:
        for case in (case for name in options.operators for case in cases(name)):
            if case.head_dim in options.head_dims:
                for row in report(case, architecture):
                    print(line(row), flush=True)
                    rows.append(row)
    store(options.json, rows, chosen)
    broken = collections.Counter(why for row in rows for why in violations(row))
    print(f"{len(rows)} kernels in {options.json}; {f'bounds broken: {dict(broken)}' if broken else 'all in bounds'}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
