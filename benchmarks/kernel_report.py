"""What the compiler makes of every Triton kernel, without a GPU.

``python -m benchmarks.kernel_report`` compiles the kernels of :mod:`benchmarks.kernel_cases` with the installed Triton,
and prints a table: the tile, registers of a thread, bytes spilled, shared memory, and how many matrix instructions;
on NVIDIA also how many blocks a multiprocessor holds at once, and how many instructions each inner loop with matrix
instructions has. It fails where a kernel does not compile, or breaks a bound of :func:`violations`.
``--architectures``, ``--operators``, ``--dtypes`` and ``--head-dims`` choose some. ``--json`` stores lines, in the
place of those of the same choice and the same Triton.
"""

import argparse
import collections
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from unittest import mock

from benchmarks.kernel_cases import HEAD_DIMS, OPERATORS, TARGETS, Case, cases, offline, operator_of  # before triton

# isort: split
import torch
import triton
from triton import knobs

import vattn
from benchmarks.assembly import resources
from vattn._attention import Attention
from vattn.kernels import configs

RESULTS = pathlib.Path(__file__).parent / "results" / "kernel_report.jsonl"

# Bytes that one program may use. Those of compute capability 8.6, which shares the table with 8.0, are 99 KiB.
SHARED_MEMORY = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
# The kernels on the online-softmax core. A program that owns 64 rows wants the matrix instructions of its architecture
# that take so many at once; one of fewer, such as the global tokens, cannot have them.
FLASH = {"token_importance"}
FLASH |= {name for name, op in vattn.ops.OPERATORS.items() if isinstance(op, Attention) and op.pairs is not None}
WIDE_INSTRUCTION = {"sm90": "wgmma", "sm100": "tcgen05"}
WIDE_ROWS = 64
# The fewest blocks that a multiprocessor of sm90 holds of a kernel in half precision without dropout, by the widest
# head dim: where there are two, one multiplies while the other waits.
MIN_BLOCKS = {"forward": {64: 2}, "backward": {64: 2}, "backward_key": {64: 2}, "decode": {64: 2}}
MAX_SPILLED_FLOAT32 = 1023  # bytes
DTYPES = ("bfloat16", "float16", "float32")


def compile_case(case: Case, architecture: str) -> list[dict[str, Any]]:
    """One row for each kernel of its own that `case` launches."""
    rows = []

    def compile_kernel(function: Any, *args: Any, **settings: Any) -> None:
        if operator_of(function, case.operator) != case.operator:  # which has cases of its own
            return
        row = describe(case, architecture, function.__name__.removesuffix("_kernel"))
        row |= {name: settings[name] for name in configs.Tiles._fields if name in settings}
        rows.append(row)
        function.device_caches.clear()  # or a kernel that another case has compiled would leave no log
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                compiled = function.warmup(*args, **settings)
        except Exception as error:  # of the compiler, which has no other name for what it meets
            row["failure"] = first_and_last_words(error)
        else:
            row |= resources(compiled, log.getvalue(), architecture)

    # The register counts are in the log of the assembler, which a cached kernel has not.
    with (
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(knobs.compilation, "always_compile", True),
        offline(architecture, compile_kernel),
    ):
        OPERATORS[case.operator].call(case.variant, case.dtype, case.head_dim)
    return rows


def describe(case: Case, architecture: str, kernel: str) -> dict[str, Any]:
    """What tells a row from others."""
    return {
        "date": datetime.date.today().isoformat(),
        "triton": triton.__version__,
        "architecture": architecture,
        "operator": case.operator,
        "kernel": kernel,
        "variant": case.variant,
        "dtype": _name(case.dtype),
        "head_dim": case.head_dim,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_and_last_words(error: BaseException) -> str:
    """Of the error behind `error`; what is between them is the program that it is about."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join([f"{type(error).__name__}: {words[0] if words else ''}", *words[1:][-1:]])


def compile_cases(jobs: list[tuple[Case, str]], processes: int) -> Iterator[list[dict[str, Any]]]:
    """:func:`compile_case` of `jobs` in their order. A compiler that takes its process along costs that job alone."""
    spawn = multiprocessing.get_context("spawn")
    while jobs:
        finished = 0
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            futures = [pool.submit(compile_case, *job) for job in jobs]
            try:
                for future in futures:
                    yield future.result()
                    finished += 1
            except BrokenProcessPool:  # by the first job without a result, or by one that ran beside it
                if processes == 1:
                    yield [describe(*jobs[finished], "") | {"failure": "the compiler ended its process"}]
                else:
                    yield from compile_cases([jobs[finished]], 1)
                finished += 1
        jobs = jobs[finished:]


def violations(row: dict[str, Any]) -> list[str]:
    """The recorded bounds that a row breaks; they are the same for every Triton."""
    if "failure" in row:
        return ["does not compile"]
    broken = []
    architecture, head_dim = row["architecture"], row["head_dim"]
    if row["shared_bytes"] > SHARED_MEMORY[architecture]:
        broken.append(f"more than {SHARED_MEMORY[architecture]} bytes of shared memory")
    if row.get("serialized"):
        broken.append("serialized wgmma")
    if row["dtype"] == "float32":
        if "blocks" in row and row["spilled_bytes"] > MAX_SPILLED_FLOAT32:
            broken.append(f"spills more than {MAX_SPILLED_FLOAT32} bytes")
        if "blocks" in row and row["operator"] in FLASH and not row["matrix_instructions"]:
            broken.append("no matrix instructions")
        return broken
    if architecture == "sm90" and head_dim <= 128 and row["spilled_bytes"] > 0:
        broken.append("spills")
    if row["operator"] in FLASH:
        if architecture == "sm90" and row["blocks"] < (least := min_blocks(row)):
            broken.append(f"fewer than {least} blocks")
        if architecture in WIDE_INSTRUCTION and own_rows(row) >= WIDE_ROWS:
            if WIDE_INSTRUCTION[architecture] not in row["matrix_instructions"]:
                broken.append(f"no {WIDE_INSTRUCTION[architecture]}")
        elif not row["matrix_instructions"]:
            broken.append("no matrix instructions")
    return broken


def min_blocks(row: dict[str, Any]) -> int:
    """The bound of :data:`MIN_BLOCKS`."""
    widths = {} if "dropout" in row["variant"] else MIN_BLOCKS.get(row["kernel"], {})
    return next((least for widest, least in widths.items() if row["head_dim"] <= widest), 1)


def own_rows(row: dict[str, Any]) -> int:
    """Rows of the tile that a program of an attention kernel owns."""
    return row["BLOCK_K" if row["kernel"] in ("backward_key", "sum") else "BLOCK_Q"]


LAYOUT = (
    "{:6} {:7} {:21} {:14} {:25} {:8} {:>4} {:>8} {:>5} {:>6} {:>9} {:>7} {:>7} {:>6} {:>9} {:12} {}"
)  # fmt: skip
HEADER = (
    "triton", "arch", "operator", "kernel", "variant", "dtype", "D", "tile", "warps", "stages", "registers", "spilled",
    "shared", "blocks", "loops", "matrix", "bounds broken",
)  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    tiles = "x".join(str(row[name]) for name in ("BLOCK_Q", "BLOCK_K") if name in row)
    names = (
        "triton", "architecture", "operator", "kernel", "variant", "dtype", "head_dim", "tiles", "num_warps",
        "num_stages", "registers", "spilled_bytes", "shared_bytes", "blocks",
    )  # fmt: skip
    cells = (str((row | {"tiles": tiles}).get(name, "")) for name in names)
    loops = "+".join(str(count) for count in row.get("loop_instructions", ()))
    matrix = " ".join(f"{count} {name}" for name, count in row.get("matrix_instructions", {}).items())
    return LAYOUT.format(*cells, loops, matrix, ", ".join(violations(row))).rstrip()


def store(path: pathlib.Path, rows: list[dict[str, Any]], chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Write `rows` to a file of JSON lines, in the place of the `chosen` ones in it."""
    known = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in known if not chosen(row)] + rows
    architectures, operators = list(TARGETS), list(OPERATORS)
    rows.sort(
        key=lambda row: (row["triton"], architectures.index(row["architecture"]), operators.index(row["operator"]))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and store; the exit status is 1 if a kernel does not compile or breaks a bound."""
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and matrix instructions.")
    parser.add_argument(
        "--json", type=pathlib.Path, nargs="?", const=RESULTS, help=f"store JSON lines, by default in {RESULTS.name}"
    )
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="by default, one per core")
    options = parser.parse_args(arguments)

    def chosen(row: dict[str, Any]) -> bool:
        return (
            row["triton"] == triton.__version__
            and row["architecture"] in options.architectures
            and row["operator"] in options.operators
            and row["dtype"] in options.dtypes
            and row["head_dim"] in options.head_dims
        )

    jobs = [
        (case, architecture)
        for architecture in options.architectures
        for name in options.operators
        for case in cases(name)
        if case.head_dim in options.head_dims and _name(case.dtype) in options.dtypes
    ]
    print(LAYOUT.format(*HEADER))
    rows = []
    for of_case in compile_cases(jobs, options.processes):
        for row in of_case:
            print(line(row), flush=True)
            rows.append(row)
    if options.json is not None:
        store(options.json, [row for row in rows if "failure" not in row], chosen)
    broken = [row for row in rows if violations(row)]
    if broken:
        print("\nBounds broken:", LAYOUT.format(*HEADER), sep="\n")
        for row in broken:
            print(line(row), *([f"    {row['failure']}"] if "failure" in row else []), sep="\n")
    counts = collections.Counter(why for row in broken for why in violations(row))
    outcome = f"bounds broken: {dict(counts)}" if broken else "all in bounds"
    print(f"\nTriton {triton.__version__}: {len(rows)} kernels, {outcome}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
