"""What a call costs that has next to no work: ``python -m benchmarks.host_cost``.

    python -m benchmarks.host_cost           measure, print, append benchmarks/results/host_cost.jsonl
    python -m benchmarks.host_cost --show    print the last run that was stored

Every attention, and PyTorch's, of two tokens with two heads of eight channels, on one thread of the CPU: the forward
without gradients, the forward with its backward, and both on the way to a GPU's kernels, where all is done but what
Triton does. There a CPU's tensors stand for a GPU's. All functions take turns of a few calls, in one process, and the
fastest turn counts: what else the machine does takes longer than a call.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import pathlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import vattn
from benchmarks import records
from vattn._attention import Attention

NAME = "host_cost"
CALLS = 20  # of a turn
PASSES = ("forward", "forward+backward", "forward to kernels", "forward+backward to kernels")
PEER = "scaled_dot_product_attention"


@dataclasses.dataclass(frozen=True)
class Line(records.Origin):
    """Seconds of a pass of a case: those of the fastest turn, and of the median one."""

    case: str
    pass_name: str
    least: float
    median: float
    turns: int


class Case(NamedTuple):
    """A call of `attend` with query, key and value of `shape`."""

    name: str
    shape: tuple[int, ...]
    attend: Callable[[Tensor, Tensor, Tensor], Any]


def cases() -> list[Case]:
    """Every attention, and the peer."""
    layout = vattn.BlockLayout(2, 1, torch.tensor([0, 1, 2]), torch.tensor([0, 1]), num_global=1)
    bias, kept = vattn.RelativePositionBias3D((2, 1, 1), num_heads=2), torch.tensor([[0, 1]])
    edge_sparse = vattn.edge_sparse_attention
    return [
        Case("leap_attention", (1, 2, 2, 1, 8), lambda q, k, v: vattn.leap_attention(q, k, v, 1)),
        Case("latent_attention", (1, 2, 2, 8), lambda q, k, v: vattn.latent_attention(q, k, v)),
        Case("axial_attention", (1, 2, 1, 2, 8), lambda q, k, v: vattn.axial_attention(q, k, v, 1)),
        Case("edge_sparse_attention", (1, 2, 3, 8), lambda q, k, v: edge_sparse(q, k, v, layout)),
        Case("with a bias", (1, 2, 3, 8), lambda q, k, v: edge_sparse(q, k, v, layout, position_bias=bias)),
        Case("node_sparse_attention", (1, 2, 2, 8), lambda q, k, v: vattn.node_sparse_attention(q, k, v, kept)),
        Case(PEER, (1, 2, 2, 8), F.scaled_dot_product_attention),
    ]  # fmt: skip


class _Idle:
    """A kernel that Triton has compiled, and does not launch."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args: None


@contextlib.contextmanager
def to_kernels() -> Iterator[None]:
    """CPU tensors go the way of a GPU's, as far as Triton's launcher. Results hold anything."""
    from vattn._operator import launcher
    from vattn.kernels import launch

    with (
        torch.library._scoped_library("vattn", "IMPL") as library,
        mock.patch.object(launch, "launch_first", lambda *args, **settings: _Idle()),
        mock.patch.object(launch, "_launched", {}),
        warnings.catch_warnings(action="ignore", category=UserWarning),  # that kernels are replaced
    ):
        for op in vattn.ops.OPERATORS.values():
            if isinstance(op, Attention):
                for each, function in ((op, "forward"), (op.backward_op, "backward")):
                    library.impl(each.name, launcher(each, f"{op.name}.{function}"), "CPU", allow_override=True)
        yield


def times(functions: Mapping[Any, Callable[[], object]], turns: int) -> dict[Any, list[float]]:
    """Seconds of a call, by turns."""
    timers = {name: Timer("function()", globals={"function": f}, num_threads=1) for name, f in functions.items()}
    for timer in timers.values():
        timer.timeit(CALLS)
    samples: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(CALLS).mean)
    return samples


def measure(chosen: list[Case], turns: int, suffix: str = "") -> dict[tuple[str, str], list[float]]:
    """By case and pass, whose name ends with `suffix`: the forward, and the forward and the backward."""
    inputs = {case: [torch.randn(case.shape) for _ in range(3)] for case in chosen}
    leaves = {case: [x.clone().requires_grad_() for x in inputs[case]] for case in chosen}
    grads = {case: torch.randn(case.shape) for case in chosen}

    def step(case: Case) -> object:
        return torch.autograd.grad(case.attend(*leaves[case]), leaves[case], grads[case])

    with torch.no_grad():
        forward = {(case.name, f"forward{suffix}"): functools.partial(case.attend, *inputs[case]) for case in chosen}
        samples = times(forward, turns)
    return samples | times({(x.name, f"forward+backward{suffix}"): functools.partial(step, x) for x in chosen}, turns)


def run(names: list[str] | None, turns: int, folder: pathlib.Path) -> list[Line]:
    """Measure, and store the lines."""
    torch.manual_seed(0)
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
    }
    chosen = [case for case in cases() if names is None or case.name in names or case.name == PEER]
    samples = measure(chosen, turns)
    with to_kernels():
        samples |= measure([case for case in chosen if case.name != PEER], turns, " to kernels")
    lines = [
        Line(**shared, case=case, pass_name=name, least=min(x), median=statistics.median(x), turns=turns)
        for (case, name), x in samples.items()
    ]
    records.append(folder / f"{NAME}.jsonl", map(dataclasses.asdict, lines))
    return lines


def load(folder: pathlib.Path) -> list[Line]:
    """The lines of the last run."""
    rows = records.read(folder / f"{NAME}.jsonl", f"python -m benchmarks.{NAME}")
    return [Line(**row) for row in rows if row["run"] == rows[-1]["run"]]


def table(lines: list[Line]) -> str:
    """The fastest turns, in microseconds."""
    least = {(line.case, line.pass_name): f"{line.least * 1e6:.1f}" for line in lines}
    first = lines[0]
    text = [
        f"Microseconds of a call with next to no work: {first.machine}, {first.threads} thread(s), "
        f"torch {first.versions['torch']}, commit {first.commit[:10]}",
        "",
        f"| case | {' | '.join(PASSES)} |",
        f"|---|{'---|' * len(PASSES)}",
    ]
    for case in dict.fromkeys(line.case for line in lines):
        text.append(f"| {case} | {' | '.join(least.get((case, name), '') for name in PASSES)} |")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Measure, store and print, or print alone."""
    parser = argparse.ArgumentParser(description="What a call costs that has next to no work.")
    parser.add_argument("--cases", nargs="+", help="names; default: all")
    parser.add_argument("--turns", type=int, default=300, help="how many each function has")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if not options.show:
        torch.set_num_threads(1)
        run(options.cases, options.turns, options.results)
    print(table(load(options.results)))


if __name__ == "__main__":
    main()
