"""Pictures of the stored lines, and of nothing else."""

import pathlib
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness import RED
from benchmarks.records import Line, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(operator: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw speed and memory, one picture each for every machine and dtype; returns the files written to `folder`.

    Of each case and pass the last run counts: only lines of one run were measured side by side.
    """
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Line]]] = {}
    for line in load(operator, folder):
        group = groups.setdefault((line.machine, line.dtype), {})
        panel = group.setdefault((line.pass_name, line.case), [])
        if panel and panel[0].run != line.run:
            panel.clear()
        panel.append(line)
    written = []
    for (machine, dtype), group in groups.items():
        slug = re.sub(r"[^a-z0-9]+", "-", f"{operator} {machine} {dtype}".lower()).strip("-")
        written.append(_draw(group, _time_over_vattn, "time / time of vattn", folder / f"{slug}-speed.png"))
        written.append(_draw(group, _extra_mebibytes, "extra memory, MiB", folder / f"{slug}-memory.png"))
    return written


def _time_over_vattn(line: Line, side_by_side: Sequence[Line]) -> float | None:
    vattn = next((other.measured for other in side_by_side if other.role == "vattn"), None)
    return line.measured.median / vattn.median if line.measured and vattn else None


def _extra_mebibytes(line: Line, side_by_side: Sequence[Line]) -> float | None:
    extra = line.measured.extra_memory if line.measured else None
    return None if extra is None else extra / 2**20


def _failed(line: Line) -> bool:
    return line.reason is not None and line.reason.startswith(RED)


def _origin(line: Line) -> str:
    dirty = " with uncommitted changes" if line.dirty else ""
    return f"{line.run[:10]} at {line.commit[:9]}{dirty}"


def _draw(
    group: dict[tuple[str, str], list[Line]],
    value: Callable[[Line, Sequence[Line]], float | None],
    label: str,
    path: pathlib.Path,
) -> pathlib.Path:
    figure_of(group, value, label).savefig(path, dpi=120)
    return path


def figure_of(
    group: dict[tuple[str, str], list[Line]], value: Callable[[Line, Sequence[Line]], float | None], label: str
) -> "Figure":
    """One panel per pass, one cluster of bars per case, one bar per provider; a provider without a time has none."""
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(pass_name for pass_name, _ in group))
    providers = list(dict.fromkeys(line.provider for lines in group.values() for line in lines))
    figure = Figure(figsize=(12, 4 * len(passes) + 0.5), layout="constrained")
    for axes, pass_name in zip(figure.subplots(len(passes), squeeze=False)[:, 0], passes, strict=True):
        cases = [case for name, case in group if name == pass_name]
        for index, provider in enumerate(providers):
            bars = [
                (position + (index + 0.5) / len(providers) * 0.8 - 0.4, height)
                for position, case in enumerate(cases)
                for line in group[pass_name, case]
                if line.provider == provider and (height := value(line, group[pass_name, case])) is not None
            ]
            if bars:
                positions, heights = zip(*bars, strict=True)
                width = 0.8 / len(providers)
                container = axes.bar(positions, heights, width, label=provider, color=f"C{index}")
                axes.bar_label(container, fmt="%.2f", fontsize=7, rotation=90, padding=2)
            wrong = sum(_failed(line) for case in cases for line in group[pass_name, case] if line.provider == provider)
            if wrong:
                label_wrong = f"{provider}: wrong in {wrong} of {len(cases)} cases, not timed there"
                axes.bar([0], [0], 0, label=label_wrong, color="none", edgecolor=f"C{index}")
        axes.set_xticks(range(len(cases)), [textwrap.fill(case, 18) for case in cases], fontsize=8)
        axes.set_ylabel(label)
        axes.set_title(pass_name)
        axes.margins(x=0.02, y=0.25)
        axes.legend(fontsize=8, ncols=max(1, min(len(providers), 5)))
    first = next(iter(group.values()))[0]
    threads = "" if first.threads is None else f", {first.threads} threads"
    runs = ", ".join(sorted({_origin(lines[0]) for lines in group.values()}))
    torch_version = first.versions["torch"]
    figure.suptitle(f"{first.operator}, {first.dtype}, {first.machine}{threads}, torch {torch_version}\n{runs}")
    return figure
