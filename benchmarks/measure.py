"""Time in interleaved rounds, peak memory, and the machine's own limits."""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

SECONDS_PER_ROUND = 0.1
MM_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough for the full rate
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # many times the last-level cache


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds: the median and the middle three fifths of the samples."""

    median: float
    p20: float
    p80: float
    samples: int


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Spread]:
    """Time `functions` in turns, `rounds` times, each round beginning with another one.

    A machine drifts (clocks, temperature, other work), and in turns the drift affects all of them equally.
    """
    sampler = _cuda_sampler if device.type == "cuda" else _cpu_sampler
    samplers = {name: sampler(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name] += samplers[name]()
    return {name: _spread(times) for name, times in samples.items()}


def _cpu_sampler(function: Callable[[], object]) -> Callable[[], list[float]]:
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    fastest = min(timer.timeit(1).mean for _ in range(3))  # one alone may have been interrupted
    number = max(1, round(SECONDS_PER_ROUND / fastest))
    return lambda: [timer.timeit(number).mean]


def _cuda_sampler(function: Callable[[], object]) -> Callable[[], list[float]]:
    from triton.testing import do_bench

    milliseconds = SECONDS_PER_ROUND * 1e3
    return lambda: [t * 1e-3 for t in do_bench(function, warmup=25, rep=milliseconds, return_mode="all")]


def _spread(times: list[float]) -> Spread:
    p20, median, p80 = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
    return Spread(median, p20, p80, len(times))


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], int]]:
    """What the machine can do: a large matrix product with its FLOP, a large copy with its bytes."""
    size = MM_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "mm": (lambda: torch.mm(a, b, out=product), 2 * size**3),
        "copy": (lambda: target.copy_(source), 2 * source.numel()),
    }


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `function` holds at once beyond what was there, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    return _peak_memory_cpu(function)


def _peak_memory_cpu(function: Callable[[], object]) -> int:
    """The peak of a running sum over the profiler's allocation events.

    They count what PyTorch's allocator gives to the calling thread, scratch inside kernels included, and leave
    out what libraries allocate by themselves.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held: dict[int, int] = {}
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= held.pop(address, 0)  # what was there before is not ours to give back
    return peak
