"""The benchmarks of ranks: what is counted on paper, and a short measurement of two processes."""

from pathlib import Path

import pytest

from benchmarks import distributed_scaling, distributed_speed, records

MACHINE = distributed_scaling.Machine(1e12, 8, 4e9, 1e9, 1e-6)


def test_a_step_on_paper_has_the_bytes_of_the_formula_and_the_arithmetic_of_a_share() -> None:
    heads, channels, latents = distributed_scaling.HEADS, distributed_scaling.HEAD_DIM, distributed_scaling.LATENTS
    step = distributed_scaling.step("latent attention, keys sharded", 65_536, 16, MACHINE)
    # out and two numbers of lse in the forward, the gradient of the query in the backward: 32 bits each
    assert step.sent == heads * latents * (2 * channels + 2) * 4
    assert step.compute == pytest.approx(2 * 7 * heads * latents * 65_536 // 16 * channels / MACHINE.flops)
    exchanged = [heads * latents * 4, heads * latents * (channels + 1) * 4, heads * latents * channels * 4]
    assert step.communication == pytest.approx(sum(MACHINE.seconds("all_reduce", n, 16) for n in exchanged))


def test_a_table_and_a_plot_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distributed_scaling.main(["--tokens", "4096", "--ranks", "2", "4", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert all(f"| {case} | 4,096 |" in text for case in distributed_scaling.CASES)
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".png"}


def test_the_speed_of_two_processes_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = "latent, 32k keys, 256 latents"
    distributed_speed.main(["--cases", case, "--rounds", "1", "--results", str(tmp_path)])
    forward, both = records.read(tmp_path / "distributed_speed.jsonl", "distributed_speed")
    assert forward["case"] == f"{case}, forward" and both["case"] == f"{case}, forward+backward"
    assert forward["speedup"] > 0 and both["memory"]["together"] < both["memory"]["alone"]
    assert capsys.readouterr().out.count(f"| {case}, forward") == 2
