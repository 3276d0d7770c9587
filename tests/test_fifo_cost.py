"""The benchmark of the queue: frames in this process, and the table of lengths in processes of their own."""

from pathlib import Path

import pytest

from benchmarks import fifo_cost, records


def test_a_cost_is_that_of_frames() -> None:
    cost = fifo_cost.measure("official_ddim", 3, 2)
    assert cost.samples == 2 and cost.median > 0 and cost.peak >= cost.before > 0


def test_lines_are_printed_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"alone": [1.0, 2.0, 4.0], "together": [4.0, 3.0, 2.0], "bytes": 48}
    monkeypatch.setattr(fifo_cost, "speeds", lambda width, frames, rounds: found)
    fifo_cost.main(["--lengths", "2", "--schedulers", "official_ddim", "--width", "1", "--results", str(tmp_path)])
    length, speeds = records.read(tmp_path / "fifo_cost.jsonl", "fifo_cost")
    assert length["frames"] == 2 and length["cost"]["samples"] == 1 and speeds["speeds"] == found
    assert "two with one each 3.00: 1.50 times" in capsys.readouterr().out
