"""The benchmark page, and the plot of the README: stored lines, and nothing else.

python -m docs._site.benchmarks_page        draws docs/pictures/speed.svg
"""

import collections
import math
import pathlib
import statistics
from collections.abc import Iterable

from benchmarks.records import RESULTS, Line, load
from docs._site.pictures import save

Group = tuple[str, str, str]
"""Operator, machine and dtype."""


def latest() -> dict[Group, dict[tuple[str, str], list[Line]]]:
    """Of each operator, machine and dtype the lines of the last run of each case and pass, side by side."""
    groups: dict[Group, dict[tuple[str, str], list[Line]]] = collections.defaultdict(dict)
    for path in sorted(RESULTS.glob("*.jsonl")):
        if not _is_of_operator(path):
            continue
        for line in load(path.stem, RESULTS):
            panels = groups[line.operator, line.machine, line.dtype]
            panel = panels.setdefault((line.case, line.pass_name), [])
            if panel and panel[0].run != line.run:
                panel.clear()
            panel.append(line)
    return dict(groups)


def _is_of_operator(path: pathlib.Path) -> bool:
    with path.open() as file:
        return '"best_peer"' in file.readline()


def speedups(lines: Iterable[Line]) -> tuple[Line | None, Line | None]:
    """Of one case and pass: vattn's line and that of the fastest peer, where they were measured."""
    measured = [line for line in lines if line.measured is not None]
    own = next((line for line in measured if line.role == "vattn"), None)
    peers = [line for line in measured if line.role == "peer"]
    return own, min(peers, key=_median, default=None)


def _median(line: Line) -> float:
    assert line.measured is not None
    return line.measured.median


def conditions(lines: Iterable[Line]) -> str:
    """Where and with what lines were measured, in one sentence."""
    lines = list(lines)
    first = lines[0]
    where = first.machine if first.threads is None else f"{first.machine}, {first.threads} threads"
    runs = sorted({(line.run[:10], line.commit[:9] + (" with changes" if line.dirty else "")) for line in lines})
    commits = ", ".join(f"{day} at commit {commit}" for day, commit in runs)
    return f"{where}; torch {first.versions['torch']}, Triton {first.versions['triton']}; {commits}"


def peers(lines: Iterable[Line]) -> str:
    """The names of the peers that were measured."""
    names = (line.provider for line in lines if line.role == "peer" and line.measured is not None)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def page() -> str:
    """The page in Markdown: a summary, then a table for each operator, machine and dtype."""
    groups = latest()
    summary = [
        "| operator | processor | dtype | forward | forward and backward |",
        "|---|---|---|---|---|",
    ]
    sections: dict[str, list[str]] = collections.defaultdict(list)
    for (operator, machine, dtype), panels in groups.items():
        ratios: dict[str, list[float]] = collections.defaultdict(list)
        rows = []
        for (case, pass_name), lines in panels.items():
            own, peer = speedups(lines)
            if own is None or own.measured is None:
                continue
            cells = [f"`{case}`", pass_name, _time(_median(own))]
            if peer is None:
                cells += ["", "", ""]
            else:
                ratio = _median(peer) / _median(own)
                ratios[pass_name].append(ratio)
                cells += [peer.provider, _time(_median(peer)), f"{ratio:.2f}"]
            extra = own.measured.extra_memory
            cells.append("" if extra is None else f"{extra / 2**20:.1f}")
            rows.append("| " + " | ".join(cells) + " |")
        means = " | ".join(_mean(ratios.get(pass_name, [])) for pass_name in ("forward", "forward+backward"))
        stored = [line for lines in panels.values() for line in lines]
        summary.append(f"| `{operator}` | {machine} | {dtype} | {means} |")
        sections[operator] += [
            f"### {machine}, {dtype}",
            f"{conditions(stored)}. Peers: {peers(stored)}.",
            "\n".join([
                "| case | pass | vattn | fastest peer | its time | speedup | extra memory, MiB |",
                "|---|---|---|---|---|---|---|",
                *rows,
            ]),
        ]  # fmt: skip
    parts = [INTRODUCTION, "\n".join(summary)]
    for operator, texts in sections.items():
        parts += [f"## {operator}", *texts]
    return "\n\n".join(parts) + "\n"


def _mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f}, {len(ratios)} cases)" if ratios else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"


INTRODUCTION = """\
# Measured speed

This page is made of the lines in `benchmarks/results/*.jsonl` when the site is built: of each operator, processor,
dtype and case the last run counts. The **speedup over the fastest peer** is the median time of that peer over
that of vattn, measured side by side in one process, after the results were found to agree. Below 1, the peer is faster.

Peers are the alternatives in plain PyTorch. Each table says which ones its runs measured, and each row names the
fastest: `sdpa` is scaled dot product attention with the permutes, gathers, mask and shift that it needs (`sdpa-flash`
and `sdpa-cudnn`: by that backend), `official` the formula of the official code, `flex` compiled FlexAttention,
`gather` keys and values copied together, `softmax` the plain formula. Earlier runs stored FlexAttention and SDPA on
views beside the peers, and not as such: these lines are not compared here.

**Extra memory** is the peak beyond the output, the log-sum-exp and, with a backward, the gradients.

In a checkout, `python -m benchmarks leap_attention --backward` measures on your machine and appends lines; `--help`
says what there is to choose. Other programs measure
[a training step of MeBT](../benchmarks/results/mebt-cost-amd-epyc-float32.md), [forward
mode](../benchmarks/results/tangents-intel-xeon-float32.md), [FIFO-Diffusion's
quality](../benchmarks/results/fifo-quality-intel-r-xeon-r-processor.md) and the [cost of a call](host-cost.md).
[Measurements on an H200](../benchmarks/results/h200.md) have a page of their own.

## Summary

The geometric mean of the speedups, and in parentheses the least of them and how many cases there are."""


def draw(machine: str = "Intel(R) Xeon(R) Processor") -> pathlib.Path:
    """The plot of the README: the latest run of every attention case measured on one machine, losses among them."""
    from matplotlib.figure import Figure

    names: list[str] = []
    bars: dict[str, list[float]] = {"forward": [], "forward+backward": []}  # NaN where a pass was not measured
    shown: list[Line] = []
    for (operator, where, dtype), panels in latest().items():
        if where != machine or not operator.endswith("_attention"):
            continue
        for case in dict.fromkeys(case for case, _ in panels):
            names.append(f"{operator.removesuffix('_attention')}, {dtype}: {case}")
            for pass_name, values in bars.items():
                own, peer = speedups(panels.get((case, pass_name), ()))
                if own is None or peer is None:
                    values.append(math.nan)
                else:
                    values.append(_median(peer) / _median(own))
                    shown += [own, peer]
    figure = Figure(figsize=(10, 0.28 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(bars.items()):
        places = [position + 0.36 * index for position in range(len(values))]
        container = axes.barh(places, values, 0.36, label=name, color=("#2e86ab", "#edae49")[index])
        labels = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(container, labels, fontsize=8, padding=2)
    axes.set_yticks([position + 0.18 for position in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#24292f", linewidth=1)
    axes.set_xlabel("speedup over the fastest peer (1: as fast)", fontsize=9)
    figure.suptitle(conditions(shown), fontsize=9)
    axes.legend(fontsize=9, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return save(figure, "speed")


if __name__ == "__main__":
    print(draw())
