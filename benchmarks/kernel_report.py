"""What the compiler makes of every Triton kernel, without a GPU.

``python benchmarks/kernel_report.py`` calls each launcher with tensors that have no memory, and compiles what it
would have launched, with the tile sizes of the table, for every architecture: registers of a thread, bytes
spilled, shared memory, and how many matrix instructions. It prints a table, stores JSON lines, and fails where a
kernel breaks a bound of :func:`violations`.
"""

import argparse
import collections
import contextlib
import datetime
import io
import json
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
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vattn.kernels import configs, latent_attention, launch, leap_attention, merge_attention, periodic_shift

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
FLASH = ("leap_attention.", "latent_attention.")  # the operators on the online-softmax core
HEAD_DIMS = (64, 72, 80, 96, 120, 128, 144, 256)


class Case(NamedTuple):
    """A call of a launcher."""

    variant: str
    dtype: torch.dtype
    head_dim: int
    call: Callable[[], Any]


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
    ):
        driver.set_active(Offline(TARGETS[architecture]))
        yield


def leap_case(head_dim: int, variant: str = "shift", dtype: torch.dtype = torch.bfloat16) -> Case:
    """Forward and backward of leap attention: "plain", with "shift", or with "shift+dropout"."""
    fold_div, dropout_p = (0 if variant == "plain" else 4), (0.1 if "dropout" in variant else 0.0)

    def call() -> None:
        query, grad_out = torch.empty(2, 2, 8, 8, 197, head_dim, dtype=dtype, device="meta")
        lse, seed = query.new_empty(query.shape[:-1], dtype=torch.float32), query.new_empty(1, dtype=torch.int64)
        settings = (4, 2, fold_div, dropout_p, seed if dropout_p > 0 else None, 0.1)
        leap_attention.forward(query, query, query, *settings)
        leap_attention.backward(grad_out, None, query, query, query, query, lse, *settings)

    return Case(variant, dtype, head_dim, call)


def latent_case(head_dim: int, variant: str = "2 segments", dtype: torch.dtype = torch.bfloat16) -> Case:
    """Forward and backward of latent attention, split ("encode") or not, with "dropout", or with "key lengths"."""
    queries, keys = (128, 8192) if variant == "encode" else (8192, 256)
    dropout_p = 0.1 if variant == "dropout" else 0.0

    def call() -> None:
        query, key = (torch.empty(2, 1, length, head_dim, dtype=dtype, device="meta") for length in (queries, keys))
        # An empty segment is one more in the loops over segments, and launches no kernel of its own.
        segments = [key, key[:, :, :0]] if variant == "2 segments" else [key]
        lengths = query.new_empty(2, dtype=torch.int64) if variant == "key lengths" else None
        lse, seed = query.new_empty(query.shape[:-1], dtype=torch.float32), query.new_empty(1, dtype=torch.int64)
        settings = (lengths, dropout_p, seed if dropout_p > 0 else None, 0.1)
        latent_attention.forward(query, segments, segments, *settings)
        latent_attention.backward(query, None, query, segments, segments, query, lse, *settings)

    return Case(variant, dtype, head_dim, call)


def shift_case(head_dim: int, transpose: bool) -> Case:
    """The periodic shift, or its transpose."""

    def call() -> None:
        x = torch.empty(2, 8, 8, 197, head_dim, dtype=torch.bfloat16, device="meta")
        periodic_shift.forward(x, 4, transpose)

    return Case("transpose" if transpose else "plain", torch.bfloat16, head_dim, call)


def merge_case(head_dim: int, parts: int) -> Case:
    """Forward and backward of merging `parts` parts."""

    def call() -> None:
        outs = list(torch.empty(parts, 2, 8, 1024, head_dim, dtype=torch.bfloat16, device="meta"))
        lses = list(torch.empty(parts, 2, 8, 1024, device="meta"))
        merge_attention.forward(outs, lses)
        merge_attention.backward(outs[0], None, outs, lses, outs[0], lses[0])

    return Case(f"{parts} parts", torch.bfloat16, head_dim, call)


def all_cases() -> list[Case]:
    """Every kernel: attention at every tuned head dim, and each flag at least twice."""
    return [
        *(leap_case(head_dim) for head_dim in HEAD_DIMS),
        *(leap_case(head_dim, variant) for head_dim in (64, 128) for variant in ("plain", "shift+dropout")),
        leap_case(64, dtype=torch.float16),
        leap_case(64, dtype=torch.float32),
        *(latent_case(head_dim) for head_dim in HEAD_DIMS),
        *(latent_case(head_dim, variant) for head_dim in (64, 128) for variant in ("encode", "dropout", "key lengths")),
        latent_case(64, dtype=torch.float16),
        latent_case(64, dtype=torch.float32),
        *(shift_case(64, transpose) for transpose in (False, True)),
        *(merge_case(64, parts) for parts in (2, 8)),
    ]


def report(case: Case, architecture: str) -> list[dict[str, Any]]:
    """One row for each kernel that `case` launches."""
    rows = []

    def compile_kernel(function: Any, *args: Any, **settings: Any) -> None:
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
                "kernel": f"{function.fn.__module__.split('.')[-1]}.{function.__name__.removesuffix('_kernel')}",
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
        case.call()
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
    if row["shared_bytes"] > SHARED_MEMORY[row["architecture"]]:
        broken.append(f"more than {SHARED_MEMORY[row['architecture']]} bytes of shared memory")
    if row["architecture"] == "sm90" and row["kernel"].startswith(FLASH) and row["dtype"] != "float32":
        if row["head_dim"] <= 128 and row["spilled_bytes"] > 0:
            broken.append("spills")
        if "wgmma" not in row["matrix_instructions"]:
            broken.append("no wgmma")
    return broken


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    tiles = "x".join(str(row[name]) for name in ("BLOCK_Q", "BLOCK_K") if name in row)
    warps = row.get("num_warps", "")
    matrix = " ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
    return (
        f"{row['architecture']:7} {row['kernel']:32} {row['variant']:13} {row['dtype']:8} {row['head_dim']:4} "
        f"{tiles:>8} {warps:>5} {row.get('num_stages', ''):>6} {row['registers']:>9} {row['spilled_bytes']:>7} "
        f"{row['shared_bytes']:>7} {matrix:12} {', '.join(violations(row))}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and store; the exit status is 1 if a kernel breaks a bound."""
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and matrix instructions.")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="file of JSON lines, written anew")
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--head-dims", nargs="+", type=int, help="only leap and latent attention, at these head dims")
    options = parser.parse_args(arguments)
    cases = all_cases()
    if options.head_dims is not None:
        cases = [case(head_dim) for case in (leap_case, latent_case) for head_dim in options.head_dims]

    header = ("arch", "kernel", "variant", "dtype", "D", "tile", "warps", "stages", "registers", "spilled", "shared")
    print("{:7} {:32} {:13} {:8} {:>4} {:>8} {:>5} {:>6} {:>9} {:>7} {:>7} matrix instructions".format(*header))
    rows = []
    for architecture in options.architectures:
        for case in cases:
            for row in report(case, architecture):
                print(line(row), flush=True)
                rows.append(row)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = collections.Counter(why for row in rows for why in violations(row))
    print(
        f"{len(rows)} kernels in {options.json}; " + (f"bounds broken: {dict(broken)}" if broken else "all in bounds")
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
