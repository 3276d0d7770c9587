"""The stored form of a measurement: one JSON line with all that is needed to read it years later."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import torch
import triton

import vattn

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Line:
    """One provider on one case in one pass. Times are in seconds, rates per second, memory in bytes.

    Attributes:
        run: when the run began, UTC: lines of one run were measured side by side, in one process.
        threads: torch's on a CPU, None on a GPU.
        kernel: whether vattn ran its kernel, or the reference for want of one.
        pass_name: "forward" (no_grad) or "forward+backward".
        reason: why there is no time: unavailable here, or red at the gate. None if it was timed.
        error, budget: of the tensor that was closest to its budget at the gate.
        median, p20, p80, samples: of the rounds.
        flops: the arithmetic of the matrix products of the pass (the backward counts five, the forward two).
        share_of_mm: of the FLOP/s of a large ``torch.mm`` in the same dtype, timed in the same rounds.
        share_of_copy: of the bytes per second of a large copy, if inputs, output and gradients moved just once.
        extra_memory: peak beyond what any implementation must hold: the output, lse, and with a backward the
            gradients (once on their own, once stacked into the leaf's) and one more buffer like lse.
        best_peer, speedup: the fastest peer of the same run, and its median over this one.
    """

    run: str
    commit: str
    dirty: bool
    device: str
    machine: str
    cores: int | None
    threads: int | None
    versions: dict[str, str]
    kernel: bool
    operator: str
    case: str
    sizes: dict[str, Any]
    dtype: str
    pass_name: str
    provider: str
    role: str
    reason: str | None
    error: float | None
    budget: float | None
    median: float | None
    p20: float | None
    p80: float | None
    samples: int
    flops: int
    share_of_mm: float | None
    share_of_copy: float | None
    mm_flops_per_second: float
    copy_bytes_per_second: float
    extra_memory: int | None
    best_peer: str | None
    speedup: float | None


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
            "triton": triton.__version__,
            "vattn": vattn.__version__,
        },
    }


def store(lines: list[Line], folder: pathlib.Path) -> pathlib.Path:
    """Append `lines`, all of one operator, to ``<folder>/<operator>.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{lines[0].operator}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(line)) + "\n" for line in lines)
    return path


def load(operator: str, folder: pathlib.Path) -> list[Line]:
    """All stored lines of `operator`, oldest first."""
    path = folder / f"{operator}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks: nothing is stored at {path}; run `python -m benchmarks {operator}` first")
    return [Line(**json.loads(text)) for text in path.read_text().splitlines()]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
