"""Time and memory of a training step, in a process of its own, so that the peak of its memory is its own, too."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import records


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one training step. Seconds, of which the first step is none; bytes.

    Attributes:
        before: resident when everything was built, but no step was done.
        peak: the most that was ever resident.
    """

    median: float
    p20: float
    p80: float
    samples: int
    before: int
    peak: int


def cost_of(step: Callable[[], object], rounds: int, limit: float) -> Cost:
    """Do at most `rounds` steps, and no more once they have taken `limit` seconds together; in this process."""
    before = resident("VmRSS")
    step()  # memory is touched, the states of an optimiser are made
    seconds: list[float] = []
    while not seconds or (len(seconds) < rounds and sum(seconds) < limit):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    p20, median, p80 = np.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
    return Cost(median, p20, p80, len(seconds), before, resident("VmHWM"))


def cost_apart(module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Cost:
    """What ``python -m <module> --here``, with `settings` as options, prints as JSON. `environment` comes on top."""
    arguments = [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", module, "--here", *arguments]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=records.ROOT, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return Cost(**json.loads(done.stdout))


def resident(what: str) -> int:
    """Bytes of this process, by Linux: VmRSS is what is resident now, VmHWM the most that ever was.

    ``getrusage`` would not do: its peak includes that of the process that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {what}")
    return int(found[1]) * 1024
