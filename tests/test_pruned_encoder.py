"""The benchmark of the pruned encoder: what it counts, measures in processes of their own, stores and prints."""

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pruned_encoder
from benchmarks.pruned_encoder import Sizes
from benchmarks.steps import Cost
from vattn.models.svitt import Sparsity

SIZES = Sizes(num_frames=4, image_size=64, dim=16, depth=12, num_heads=2, block_size=4)  # 64 patches
OPTIONS = [x for name, size in SIZES._asdict().items() for x in (f"--{name.replace('_', '-')}", str(size))]


def cost(seconds, mebibytes):
    return Cost(seconds, seconds, seconds, 1, 2**20, (1 + mebibytes) * 2**20)


def test_multiply_adds_are_those_of_the_encoder(monkeypatch):
    sparsity = Sparsity(num_random=None, keep=0.6)
    monkeypatch.setitem(pruned_encoder.SETTINGS, "nodes", sparsity)
    encoder = pruned_encoder.build("nodes", SIZES)
    with FlopCounterMode(display=False) as counter:  # counts two for each
        kept = encoder(torch.randn(1, 4, 3, 64, 64)).kept
    assert [positions.shape[1] for positions in kept] == [39, 24, 15]
    assert pruned_encoder.multiply_adds("nodes", SIZES) == counter.get_total_flops() / 2


def test_sparse_edges_spare_multiply_adds_of_the_attention_alone():
    dense, edges = (pruned_encoder.multiply_adds(setting, SIZES) for setting in ("dense", "edges"))
    hidden = 64 * (64 - 4 * SIZES.block_size)  # each token reads four blocks of the others, and the global token
    assert dense - edges == SIZES.depth * 2 * hidden * SIZES.dim


def test_a_setting_is_measured_in_a_process_of_its_own_and_stored(tmp_path, capsys):
    pruned_encoder.main(["--settings", "both", "--rounds", "1", "--results", str(tmp_path), *OPTIONS])
    (line,) = pruned_encoder.load(tmp_path)
    assert (line.setting, line.sizes) == ("both", SIZES._asdict())
    assert line.cost.samples == 1 and line.cost.median > 0 and line.cost.peak > line.cost.before > 0
    assert pruned_encoder.table([line]) in capsys.readouterr().out


def test_settings_are_compared_with_the_first_and_only_the_last_run_is_shown(tmp_path, monkeypatch, capsys):
    costs = {"dense": cost(4.0, 100), "both": cost(1.0, 30)}
    monkeypatch.setattr(pruned_encoder, "cost_apart", lambda module, options: costs[options["settings"]])
    lines = pruned_encoder.run(["dense", "both"], SIZES, 1, 1.0, tmp_path)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in pruned_encoder.table(lines).splitlines()[-2:]]
    assert rows[0][2::3] == ["1.000"] * 3
    assert rows[1][2::3] == [f"{lines[1].multiply_adds / lines[0].multiply_adds:.3f}", "0.250", "0.300"]

    newer = dataclasses.asdict(lines[0]) | {"run": "2101-01-01T00:00:00+00:00"}
    pruned_encoder.records.append(tmp_path / "pruned_encoder.jsonl", [newer])
    pruned_encoder.main(["--show", "--results", str(tmp_path)])
    assert "run of 2101-01-01" in (shown := capsys.readouterr().out)
    assert "| both |" not in shown
