"""The stored form of a measurement: one JSON line with all that is needed to read it years later."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import torch

import vattn

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times in seconds, memory in bytes.

    Attributes:
        median, p20, p80, samples: of the rounds.
        share_of_mm: of the FLOP/s of a large ``torch.mm`` in the same dtype, timed in the same rounds.
        share_of_copy: of the bytes per second of a large copy, if inputs, output and gradients moved just once.
        extra_memory: peak of the whole pass beyond what any implementation must hold: the output, lse, and with a
            backward the gradients (once on their own, once stacked into the leaf's) and one more buffer like lse.
            Negative where not all of that is held at once. None for a limit, which does not do all the work.
        speedup: the fastest peer's median over this one; None if no peer was measured.
    """

    median: float
    p20: float
    p80: float
    samples: int
    share_of_mm: float
    share_of_copy: float
    extra_memory: int | None
    speedup: float | None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a line comes from: `run` is when its run began, UTC; the others are what :func:`environment` says."""

    run: str
    commit: str
    dirty: bool
    device: str
    machine: str
    cores: int | None
    threads: int | None
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Line(Origin):
    """One provider on one case in one pass.

    Attributes:
        run: when the run began, UTC: lines of one run were measured side by side, in one process.
        threads: torch's on a CPU, None on a GPU.
        kernel: whether vattn ran its kernel, or the reference for want of one.
        pass_name: "forward" (no_grad) or "forward+backward".
        flops: the arithmetic of the matrix products of the pass (the backward counts five, the forward two).
        mm_flops_per_second, copy_bytes_per_second: what the machine did, timed in the same rounds.
        best_peer: the fastest of the peers in the same rounds.
        reason: why nothing was measured: unavailable here, or red at the gate.
        error, budget: of the tensor that was closest to its budget at the gate.
    """

    kernel: bool
    operator: str
    case: str
    sizes: dict[str, Any]
    dtype: str
    pass_name: str
    flops: int
    mm_flops_per_second: float
    copy_bytes_per_second: float
    best_peer: str | None
    provider: str
    role: str
    reason: str | None
    error: float | None
    budget: float | None
    measured: Measured | None


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a line that say where and with what it was measured."""
    on_gpu = device.type == "cuda"
    return {
        "commit": _git("rev-parse", "HEAD"),
        # Lines stored a moment ago do not change what is measured now.
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")),
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cores": None if on_gpu else os.cpu_count(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "vattn": vattn.__version__,
        },
    }


def store(lines: list[Line], folder: pathlib.Path) -> pathlib.Path:
    """Append `lines`, all of one operator, to ``<folder>/<operator>.jsonl``."""
    path = folder / f"{lines[0].operator}.jsonl"
    append(path, map(dataclasses.asdict, lines))
    return path


def load(operator: str, folder: pathlib.Path) -> list[Line]:
    """All stored lines of `operator`, oldest first."""
    lines = []
    for fields in read(folder / f"{operator}.jsonl", f"python -m benchmarks {operator}"):
        measured = fields.pop("measured")
        lines.append(Line(**fields, measured=None if measured is None else Measured(**measured)))
    return lines


def append(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append a JSON line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: pathlib.Path, command: str) -> list[dict[str, Any]]:
    """All rows that `command` has appended, oldest first."""
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks: nothing is stored at {path}; run `{command}` first")
    return [json.loads(text) for text in path.read_text().splitlines()]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
