"""Lines as text: a table per case and pass, and a summary over the cases."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.records import Line

COLUMNS: dict[str, Callable[[Line], str]] = {
    "provider": lambda line: line.provider,
    "median": lambda line: f"{line.median * 1e3:.3f} ms",
    "p20 .. p80": lambda line: f"{line.p20 * 1e3:.3f} .. {line.p80 * 1e3:.3f}",
    "GFLOP/s": lambda line: f"{line.flops / line.median * 1e-9:.1f}",
    "of mm": lambda line: f"{line.share_of_mm:.0%}",
    "of copy": lambda line: f"{line.share_of_copy:.0%}",
    "extra MiB": lambda line: "" if line.extra_memory is None else f"{line.extra_memory / 2**20:.2f}",
    "error / budget": lambda line: f"{line.error:.1e} / {line.budget:.1e}",
    "best peer / this": lambda line: "" if line.speedup is None else f"{line.speedup:.2f}x",
}


def table(lines: Sequence[Line]) -> str:
    """The providers of one case and pass, side by side."""
    first = lines[0]
    rows = [list(COLUMNS)] + [[cell(line) for cell in COLUMNS.values()] for line in lines if line.median is not None]
    widths = [max(map(len, column)) for column in zip(*rows)]
    title = (
        f"{first.operator}  {first.case}  {first.dtype}  {first.pass_name}  "
        f"(mm {first.mm_flops_per_second * 1e-9:.0f} GFLOP/s, copy {first.copy_bytes_per_second * 1e-9:.1f} GB/s)"
    )
    text = [title]
    for row in rows:
        name, *cells = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        text.append("  " + "  ".join([name, *cells]))
    text += [f"  {line.provider}  {line.reason}" for line in lines if line.reason is not None]
    return "\n".join(text)


def summary(lines: Sequence[Line]) -> str:
    """Over all cases, for each pass: by what factor vattn is faster than the best peer and than each other provider."""
    text = []
    for dtype, pass_name in dict.fromkeys((line.dtype, line.pass_name) for line in lines):
        chosen = [line for line in lines if (line.dtype, line.pass_name) == (dtype, pass_name)]
        vattn = {line.case: line for line in chosen if line.role == "vattn" and line.median is not None}
        ratios = {"best peer": {case: line.speedup for case, line in vattn.items() if line.speedup is not None}}
        for line in chosen:
            if line.role != "vattn" and line.median is not None and line.case in vattn:
                ratios.setdefault(line.provider, {})[line.case] = line.median / vattn[line.case].median
        for name, by_case in ratios.items():
            if by_case:
                worst = min(by_case, key=by_case.__getitem__)
                text.append(
                    f"{dtype} {pass_name}: {name} / vattn: geometric mean {statistics.geometric_mean(by_case.values()):.2f}x "
                    f"over {len(by_case)} cases, minimum {by_case[worst]:.2f}x ({worst})"
                )
        red = sorted({line.case for line in chosen if line.role == "vattn" and line.reason is not None})
        text += [f"{dtype} {pass_name}: vattn was not timed on {case}" for case in red]
    return "\n".join(text)
