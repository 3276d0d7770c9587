"""The benchmark of MeBT's cost: points in processes of their own, what they foretell, and what is drawn of them."""

import dataclasses

import pytest
import torch

from benchmarks import mebt_cost
from benchmarks.mebt_cost import Cost, Sizes

SIZES = Sizes(dim=16, num_heads=2, num_latents=4, vocab_size=8)
OPTIONS = [x for name, size in SIZES._asdict().items() for x in (f"--{name.replace('_', '-')}", str(size))]


def cost(seconds, mebibytes):
    return Cost(seconds, seconds, seconds, 1, 2**20, (1 + mebibytes) * 2**20)


def test_both_models_answer_for_the_targets_alone():
    codes, context, target = torch.randint(8, (1, 12)), torch.arange(4)[None], torch.arange(5, 11)[None]
    for name in mebt_cost.MODELS:
        logits = mebt_cost.build(name, 12, SIZES)(codes, context, target)
        assert logits.shape == (1, 6, 8)


def test_every_token_of_the_dense_model_reads_every_token():
    model = mebt_cost.build("dense", 6, SIZES)
    contexts, targets = torch.randn(2, 1, 3, 16).unbind()
    contexts, targets = contexts.requires_grad_(), targets.requires_grad_()
    model.transformer(torch.empty(1, 0, 16), contexts, targets)[0, 1].sum().backward()
    assert contexts.grad.abs().amin() > 0 and targets.grad.abs().amin() > 0


def test_a_point_is_measured_stored_and_drawn(tmp_path, capsys):
    arguments = ["--models", "mebt", "--tokens", "8", "--rounds", "1", "--results", str(tmp_path)]
    mebt_cost.main([*arguments, *OPTIONS])
    (line,) = mebt_cost.load(tmp_path)
    assert (line.model, line.tokens, line.sizes) == ("mebt", 8, SIZES._asdict() | {"num_layers": 24})
    assert line.cost.samples == 1 and line.cost.median > 0 and line.cost.peak > line.cost.before > 0
    assert mebt_cost.row(line) in capsys.readouterr().out
    (picture,), (table,) = (list(tmp_path.glob(f"mebt-cost-*.{kind}")) for kind in ("png", "md"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert mebt_cost.row(line) in table.read_text()


def test_what_would_take_too_long_is_not_tried(tmp_path, monkeypatch):
    tried = []

    def measure(name, tokens, sizes, rounds, limit):
        tried.append((name, tokens))
        return cost((tokens / 100) ** (1 if name == "mebt" else 2), tokens)

    monkeypatch.setattr(mebt_cost, "_measure_apart", measure)
    lines = mebt_cost.run(["mebt", "dense"], [100, 200, 400], SIZES, rounds=1, limit=10.0, folder=tmp_path)
    assert tried == [("mebt", 100), ("mebt", 200), ("mebt", 400), ("dense", 100), ("dense", 200)]
    assert [line.reason for line in lines] == [None] * 5 + ["would take about 16 s, more than 10 s"]
    assert mebt_cost.load(tmp_path) == lines
    assert mebt_cost.summary(lines)[2] == "dense: seconds grows as N ** 2.00, from N = 100 to 200 as N ** 2.00"


@pytest.mark.parametrize(
    ("limit", "memory", "reason"),
    [
        (100.0, 2**40, None),
        (15.0, 2**40, "would take about 16 s, more than 15 s"),
        (100.0, 2**20, "would take about 4 MiB, more than 1 MiB"),
    ],
    ids=["nothing", "time", "memory"],
)
def test_the_last_two_points_foretell_the_next(limit, memory, reason):
    measured = {1: cost(0.0, 100), 2: cost(1.0, 0), 4: cost(4.0, 1)}
    assert mebt_cost.foretold(measured, 8, limit, memory) == reason
    assert mebt_cost.foretold({8: measured[4]}, 16, 0.0, 0) is None


def test_only_the_last_run_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(mebt_cost, "_measure_apart", lambda *_: cost(1.0, 1))
    (line,) = mebt_cost.run(["mebt"], [8], SIZES, 1, 1.0, tmp_path)
    older = dataclasses.asdict(line) | {"run": "2001-01-01T00:00:00+00:00", "tokens": 16}
    newer = dataclasses.asdict(line) | {"run": "2101-01-01T00:00:00+00:00"}
    mebt_cost.records.append(tmp_path / "mebt_cost.jsonl", [older, newer])
    assert [loaded.run for loaded in mebt_cost.load(tmp_path)] == [newer["run"]]
