"""What ranks gain on a CPU: two gloo processes of one thread each, and one process of one thread, in turn.

    python -m benchmarks.distributed_speed            measure, print, append benchmarks/results/distributed_speed.jsonl

Both run in the same two processes. The memory is what a pass allocates at its peak, beyond its inputs, and those
inputs.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import vattn
from benchmarks import records
from benchmarks.measure import peak_memory
from vattn import distributed

NAME = "distributed_speed"
PASSES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator and its shapes `(B, H, ..., D)`; the last axis but `inner` others and D is sharded."""

    operator: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    sharded: tuple[str, ...]  # of query, key and value
    settings: dict[str, Any]
    over_ranks: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "latent, 32k keys, 256 latents": Case(
        "latent_attention", (1, 8, 256, 64), (1, 8, 32768, 64), ("key", "value"), {}, {"sharded": "keys"}
    ),
    "latent, 32k queries, 256 latents": Case(
        "latent_attention", (1, 8, 32768, 64), (1, 8, 256, 64), ("query",), {}, {"sharded": "queries"}
    ),
    "leap, groups inside shards": Case(
        "leap_attention", (2, 12, 16, 197, 64), (2, 12, 16, 197, 64), ("query", "key", "value"), {"leap": 2}
    ),
    "leap, groups across shards": Case(
        "leap_attention", (2, 12, 16, 197, 64), (2, 12, 16, 197, 64), ("query", "key", "value"), {"leap": 8}
    ),
}


def passes(case: Case, group: Any) -> dict[str, Callable[[], object]]:
    """The passes of a case, of one device where there is no group; every tensor is a leaf."""
    torch.manual_seed(0)
    tensors = {"query": torch.randn(case.query), "key": torch.randn(case.key), "value": torch.randn(case.key)}
    grad = torch.randn(case.query)
    settings = dict(case.settings)
    function: Callable[..., Any] = getattr(vattn, case.operator)
    if group is not None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        for name in case.sharded:
            tensors[name] = tensors[name].chunk(size, 2)[rank].clone()
        if "query" in case.sharded:
            grad = grad.chunk(size, 2)[rank].clone()
        of_shards = [tensors[case.sharded[0]].shape[2]] * size
        function, settings = getattr(distributed, case.operator), settings | case.over_ranks
        settings |= {"group": group, "lengths": of_shards}
    leaves = [x.requires_grad_() for x in tensors.values()]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*leaves, **settings)

    def both() -> Any:
        return torch.autograd.grad(function(*leaves, **settings), leaves, grad)

    return dict(zip(PASSES, (forward, both), strict=True))


def _measure(rank: int, names: Sequence[str], rounds: int, folder: str) -> None:
    """What one of two processes does: alone, where it is the first, and together, in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in names:
        ways = {"together": passes(CASES[name], dist.group.WORLD)}
        if rank == 0:
            ways["alone"] = passes(CASES[name], None)
        for which in PASSES:
            seconds: dict[str, list[float]] = {"alone": [], "together": []}
            for i in range(rounds + 1):
                for way in seconds:
                    dist.barrier()
                    if way in ways:
                        start = time.perf_counter()
                        ways[way][which]()
                        if i:  # the first round warms up
                            seconds[way].append(time.perf_counter() - start)
            dist.barrier()
            together = peak_memory(ways["together"][which], torch.device("cpu"))
            dist.barrier()
            if rank == 0:
                memory = {"alone": peak_memory(ways["alone"][which], torch.device("cpu")), "together": together}
                found[f"{name}, {which}"] = {"seconds": seconds, "memory": memory}
    if rank == 0:
        pathlib.Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Of each case and pass: "seconds" of the rounds and bytes of "memory", "alone" and "together"."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, (list(names), rounds, folder), nprocs=2)
        return json.loads(pathlib.Path(folder, "found.json").read_text())


def run(names: Sequence[str], rounds: int, folder: pathlib.Path) -> None:
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
    }
    found = measure(names, rounds)
    print(f"{shared['machine']}, median of {rounds} rounds\n")
    print("| case, pass | one process, ms | two, ms | speedup | peak of one, MiB | of each of two, MiB |")
    print("|---|---|---|---|---|---|")
    for name, result in found.items():
        alone, together = (1e3 * float(np.median(result["seconds"][way])) for way in ("alone", "together"))
        peaks = [result["memory"][way] / 2**20 for way in ("alone", "together")]
        speedup = alone / together
        print(f"| {name} | {alone:.1f} | {together:.1f} | {speedup:.2f} | {peaks[0]:.1f} | {peaks[1]:.1f} |")
        records.append(folder / f"{NAME}.jsonl", [shared | {"case": name, "speedup": speedup, **result}])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    options = parser.parse_args(arguments)
    run(options.cases, options.rounds, options.results)


if __name__ == "__main__":
    main()
