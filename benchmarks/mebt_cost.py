"""What a training step of MeBT costs as videos grow, beside a transformer in which every token reads every token.

    python -m benchmarks.mebt_cost           measure, print, append benchmarks/results/mebt_cost.jsonl, draw
    python -m benchmarks.mebt_cost --draw    draw the stored lines

A step goes from codes to embeddings, loss, gradients and AdamW, in float32, for one video of which half of the N tokens
are contexts and half are targets::

    mebt     the 24 layers of the official configurations; 256 latents stand between contexts and targets: O(N)
    dense    torch.nn.TransformerEncoder of the same depth, width and heads, on contexts and targets: O(N**2)

Both have heads of 64 channels, as the official model has. The vocabulary is 1024 codes instead of 16384: at a width of
256, the logits of the latter would cost more than all else, and the same in both. Every point has a process of its own,
so that the peak of its memory is its own, too. A point is left out where those before it foretell a step beyond the
limit of time, or more memory than there is.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.steps import Cost, cost_apart, cost_of
from vattn.models.mebt import OFFICIAL_MODES, MeBT, masked_loss, split_positions

NAME = "mebt_cost"
MODELS = ("mebt", "dense")
TOKENS = (1024, 4096, 16384, 65536)


class Sizes(NamedTuple):
    """Of both models; both are as deep as the official MeBT."""

    dim: int = 256
    num_heads: int = 4
    num_latents: int = 256
    vocab_size: int = 1024


@dataclasses.dataclass(frozen=True)
class Line(records.Origin):
    """One model at one length.

    Attributes:
        reason: why nothing was measured.
    """

    dtype: str
    sizes: dict[str, int]
    model: str
    tokens: int
    reason: str | None
    cost: Cost | None


class DenseTransformer(nn.Module):
    """In place of :class:`vattn.models.mebt.LatentTransformer`: contexts and targets read each other, not latents."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            sizes.dim, sizes.num_heads, 4 * sizes.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, len(OFFICIAL_MODES), enable_nested_tensor=False)
        self.ln_f = nn.LayerNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.vocab_size, bias=False)

    def forward(self, latents: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
        tokens = self.blocks(torch.cat([contexts, targets], 1))
        return self.head(self.ln_f(tokens[:, contexts.shape[1] :]))


def build(name: str, tokens: int, sizes: Sizes) -> MeBT:
    model = MeBT(
        sizes.vocab_size,
        (tokens, 1, 1),  # positions are a table: the shape of the grid costs nothing
        sizes.dim,
        sizes.num_heads,
        OFFICIAL_MODES if name == "mebt" else (),
        sizes.num_latents if name == "mebt" else 1,
    )
    if name == "dense":
        model.transformer = DenseTransformer(sizes)  # type: ignore[assignment]
    return model


def measure(name: str, tokens: int, sizes: Sizes, rounds: int, limit: float) -> Cost:
    """Do at most `rounds` steps, and no more once they have taken `limit` seconds together; in this process."""
    torch.manual_seed(0)
    model = build(name, tokens, sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    codes = torch.randint(sizes.vocab_size, (1, tokens))
    context, target = split_positions(torch.randperm(tokens)[None], tokens // 2)

    def step() -> None:
        logits = model(codes, context, target)
        loss = masked_loss(logits, codes.gather(1, target), target.shape[1], tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return cost_of(step, rounds, limit)


def exponent(tokens: Sequence[int], amounts: Sequence[float]) -> float:
    """The slope of a line through the logarithms: ``amount ~ tokens ** exponent``.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(tokens), np.log(amounts), 1)[0])


def foretold(measured: Mapping[int, Cost], tokens: int, limit: float, memory: int) -> str | None:
    """Why a step of `tokens` tokens is not to be tried, by the growth from the last point but one to the last."""
    if len(measured) < 2:
        return None
    last_two = sorted(measured)[-2:]
    for amounts, most, unit in (
        ([measured[n].median for n in last_two], limit, "s"),
        ([measured[n].peak / 2**20 for n in last_two], memory / 2**20, "MiB"),
    ):
        expected = amounts[1] * (tokens / last_two[1]) ** exponent(last_two, amounts)
        if expected > most:
            return f"would take about {expected:.0f} {unit}, more than {most:.0f} {unit}"
    return None


def run(
    models: Sequence[str], tokens: Sequence[int], sizes: Sizes, rounds: int, limit: float, folder: pathlib.Path
) -> list[Line]:
    """Measure every model at every length, each in a process of its own; print and store the lines."""
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
        "dtype": "float32",
        "sizes": sizes._asdict() | {"num_layers": len(OFFICIAL_MODES)},
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = []
    for name in models:
        measured: dict[int, Cost] = {}
        for count in sorted(tokens):
            reason = foretold(measured, count, limit, memory)
            if reason is None:
                measured[count] = _measure_apart(name, count, sizes, rounds, limit)
            lines.append(Line(**shared, model=name, tokens=count, reason=reason, cost=measured.get(count)))
            records.append(_path(folder), [dataclasses.asdict(lines[-1])])
            print(row(lines[-1]), flush=True)
    return lines


def load(folder: pathlib.Path) -> list[Line]:
    """The lines of the last run."""
    rows = records.read(_path(folder), f"python -m benchmarks.{NAME}")
    lines = [Line(**(fields | {"cost": fields["cost"] and Cost(**fields["cost"])})) for fields in rows]
    return [line for line in lines if line.run == lines[-1].run]


def row(line: Line) -> str:
    """A row of the table: model, tokens, seconds, MiB."""
    if line.cost is None:
        return f"| {line.model:<5} | {line.tokens:>6} | {line.reason} | | | |"
    cost = line.cost
    spread = f"{cost.p20:.3f} .. {cost.p80:.3f}"
    peak, of_steps = (f"{size / 2**20:.0f}" for size in (cost.peak, cost.peak - cost.before))
    return f"| {line.model:<5} | {line.tokens:>6} | {cost.median:>8.3f} | {spread:>18} | {peak:>9} | {of_steps:>10} |"


def summary(lines: Sequence[Line]) -> list[str]:
    """How the time and the memory of each model grow with the number of tokens."""
    text = []
    for name, points in _by_model(lines).items():
        if len(points) < 2:
            continue
        tokens = [line.tokens for line in points]
        for what, amounts in _amounts(points).items():
            text.append(
                f"{name}: {what} grows as N ** {exponent(tokens, amounts):.2f}, "
                f"from N = {tokens[-2]} to {tokens[-1]} as N ** {exponent(tokens[-2:], amounts[-2:]):.2f}"
            )
    return text


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """A picture and a table of the last run; returns the files written to `folder`."""
    from matplotlib.figure import Figure

    lines = load(folder)
    first = lines[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first.sizes.items())
    title = f"one training step, {first.dtype}, batch 1, {sizes}"
    where = f"{first.machine}, {first.threads} threads, torch {first.versions['torch']}"
    stem = folder / re.sub(r"[^a-z0-9]+", "-", f"{NAME} {first.machine} {first.dtype}".lower()).strip("-")

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, points in _by_model(lines).items():
        tokens = [line.tokens for line in points]
        for axes, (what, amounts) in zip(panels, _amounts(points).items(), strict=True):
            growth = f", N ** {exponent(tokens, amounts):.2f}" if len(points) > 1 else ""
            axes.loglog(tokens, amounts, "o-", base=2, label=f"{name}{growth}")
            axes.set(xlabel="tokens N", ylabel=what)
            axes.grid(alpha=0.3)
            axes.legend()
    figure.suptitle(f"{title}\n{where}, {first.run[:10]} at {first.commit[:9]}")
    picture, table = stem.with_suffix(".png"), stem.with_suffix(".md")
    figure.savefig(picture, dpi=120)

    header = "| model | tokens | median, s | p20 .. p80, s | peak, MiB | of the steps, MiB |\n|---|---|---|---|---|---|"
    text = [f"{title}; {where}, run of {first.run} at {first.commit[:9]}.", "", header, *map(row, lines), ""]
    table.write_text("\n".join([*text, *(f"- {sentence}" for sentence in summary(lines))]) + "\n")
    return [picture, table]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mebt_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7, help="most steps that are timed at a point")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds: no step longer, no more steps after")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--here", action="store_true", help="one point, in this process, which prints it as JSON")
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes._fields})
    if options.here:
        cost = measure(options.models[0], options.tokens[0], sizes, options.rounds, options.limit)
        print(json.dumps(dataclasses.asdict(cost)))
        return
    if not options.draw:
        lines = run(options.models, options.tokens, sizes, options.rounds, options.limit, options.results)
        print("\n".join(summary(lines)))
    for path in draw(options.results):
        print(f"wrote {path}")


def _measure_apart(name: str, tokens: int, sizes: Sizes, rounds: int, limit: float) -> Cost:
    settings: dict[str, Any] = {"models": name, "tokens": tokens, "rounds": rounds, "limit": limit, **sizes._asdict()}
    return cost_apart(f"benchmarks.{NAME}", settings)


def _by_model(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines that have been measured."""
    names = dict.fromkeys(line.model for line in lines)
    return {name: [line for line in lines if line.model == name and line.cost is not None] for name in names}


def _amounts(points: Sequence[Line]) -> dict[str, list[float]]:
    costs = [line.cost for line in points if line.cost is not None]
    return {
        "seconds": [cost.median for cost in costs],
        "memory of the steps, MiB": [(cost.peak - cost.before) / 2**20 for cost in costs],
    }


def _path(folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{NAME}.jsonl"


if __name__ == "__main__":
    main()
