"""Lines as text: a table per case and pass, and a summary over the cases."""

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.records import Line, Measured

COLUMNS: dict[str, Callable[[Line, Measured], str]] = {
    "provider": lambda line, m: line.provider,
    "median": lambda line, m: f"{m.median * 1e3:.3f} ms",
    "p20 .. p80": lambda line, m: f"{m.p20 * 1e3:.3f} .. {m.p80 * 1e3:.3f}",
    "GFLOP/s": lambda line, m: f"{line.flops / m.median * 1e-9:.1f}",
    "of mm": lambda line, m: f"{m.share_of_mm:.0%}",
    "of copy": lambda line, m: f"{m.share_of_copy:.0%}",
    "extra MiB": lambda line, m: "" if m.extra_memory is None else f"{m.extra_memory / 2**20:.2f}",
    "error / budget": lambda line, m: f"{line.error:.1e} / {line.budget:.1e}",
    "best peer / this": lambda line, m: "" if m.speedup is None else f"{m.speedup:.2f}x",
}
MEANINGS = {
    "median": "of the rounds, in which the providers take turns",
    "p20 .. p80": "the middle three fifths of the rounds, in milliseconds",
    "GFLOP/s": "the matrix products of the pass (two forward, five more backward) per second",
    "of mm": "of the rate of a large torch.mm in the same rounds",
    "of copy": "of the bandwidth of a large copy, if inputs, output and gradients moved once",
    "extra MiB": "peak memory beyond output, lse and gradients",
    "error / budget": "largest error against the reference in float64, and what the gate allows",
    "best peer / this": "speedup over the fastest peer",
}


def table(lines: Sequence[Line]) -> str:
    """The providers of one case and pass, side by side."""
    first = lines[0]
    rows = [list(COLUMNS)]
    rows += [[cell(line, line.measured) for cell in COLUMNS.values()] for line in lines if line.measured is not None]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = (
        f"{first.operator}  {first.case}  {first.dtype}  {first.pass_name}  "
        f"(mm {first.mm_flops_per_second * 1e-9:.0f} GFLOP/s, copy {first.copy_bytes_per_second * 1e-9:.1f} GB/s)"
    )
    text = [title]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        text.append("  " + "  ".join([row[0].ljust(widths[0]), *cells]))
    text += [f"  {line.provider}  {line.reason}" for line in lines if line.reason is not None]
    return "\n".join(text)


def summary(lines: Sequence[Line]) -> str:
    """For each dtype and pass, over all cases: by what factor vattn is faster than the others."""
    text = []
    for dtype, pass_name in dict.fromkeys((line.dtype, line.pass_name) for line in lines):
        chosen = [line for line in lines if (line.dtype, line.pass_name) == (dtype, pass_name)]
        rivals = {
            "best peer": [line for line in chosen if line.role == "peer"],
            "best of all but limits": [line for line in chosen if line.role in ("peer", "other")],
            **{
                name: [line for line in chosen if line.provider == name]
                for name in dict.fromkeys(line.provider for line in chosen if line.role != "vattn")
            },
        }
        vattn = {line.case: line.measured.median for line in chosen if line.role == "vattn" and line.measured}
        for name, members in rivals.items():
            best: dict[str, float] = {}
            for line in members:
                if line.measured:
                    best[line.case] = min(line.measured.median, best.get(line.case, math.inf))
            ratios = {case: best[case] / vattn[case] for case in vattn if case in best}
            if ratios:
                worst = min(ratios, key=ratios.__getitem__)
                text.append(
                    f"{dtype} {pass_name}: {name} / vattn: geometric mean "
                    f"{statistics.geometric_mean(ratios.values()):.2f}x over {len(ratios)} cases, "
                    f"minimum {ratios[worst]:.2f}x ({worst})"
                )
        for line in chosen:
            if line.role == "vattn" and line.measured is None:
                text.append(f"{dtype} {pass_name}: vattn was not timed on {line.case}: {line.reason}")
    return "\n".join(text)
