"""The benchmark of FIFO's quality: it measures all ways to make videos, and its table says what was measured."""

import pytest
import torch

from benchmarks import fifo_quality
from benchmarks.fifo_quality import METHODS, TRAININGS, judge, measure, table
from examples.fifo_long_video import Size


def test_measures_of_known_videos():
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, 64, 8, 8, generator=generator) - 0.5
    same = measure([clip, clip], [clip, clip])
    assert same["distance"] == pytest.approx(0, abs=1e-4)
    assert same["jump"] == pytest.approx(100 / 6, rel=0.02) and same["largest"] > same["jump"]
    lighter = measure([clip + 0.5, clip], [clip, clip])
    assert lighter["distance"] == pytest.approx(0.5 * (12 * 0.5**2) ** 0.5, rel=1e-3)  # quarters of three channels
    still = torch.zeros(3, 33, 8, 8)
    still[:, 16:] = 0.5
    jump = measure([still], [clip])
    assert jump["jump"] == pytest.approx(25 / 32) and jump["largest"] == pytest.approx(25 / 4)


@pytest.mark.slow
def test_all_ways_are_measured_stored_and_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fifo_quality, "SMALLER", Size(16, 1))
    monkeypatch.setattr(fifo_quality, "NAMES", ("carphone_pristine",))
    results, outputs = tmp_path / "results", tmp_path / "outputs"
    arguments = ["--steps", "1", "--size", "8", "--seeds", "2", "--first", "2", "--last", "10"]
    fifo_quality.main([*arguments, "--outputs", str(outputs), "--results", str(results)])
    lines = fifo_quality.load(results)
    assert len(lines) == 2 + 2 * len(TRAININGS) * len(METHODS)
    assert lines[0].measures["distance"] == pytest.approx(0, abs=1e-4)
    assert lines[1].measures["distance"] > 0.01  # the last quarter is no copy of the others
    (page,) = results.glob("fifo-quality-*.md")
    assert page.read_text() in capsys.readouterr().out
    assert lines[0].machine in page.read_text() and lines[0].run[:10] in page.read_text()
    for row in (*table(lines), *judge(lines)):
        assert row in page.read_text()
    assert len(table(lines)) == 2 + 2 + len(TRAININGS) * len(METHODS)


def test_what_is_better_for_which_seed():
    def line(method, seed, distance):
        measures = {"distance": distance, "jump": 1.0, "largest": 1.0}
        return fifo_quality.Line(
            "now", "0", False, "cpu", "some", 1, 1, {}, "equal", 1, seed, method, 0, 1, measures
        )  # fmt: skip

    distances = {"FIFO, plain": (3, 3), "FIFO, lookahead": (2, 4), "FIFO, partitions": (1, 2), "FIFO, both": (1, 1)}
    lines = [line(method, seed, x) for method, both in distances.items() for seed, x in enumerate(both)]
    text = judge(lines)
    assert "partitioning: distance 3.00 -> 1.50, lower for 2 of 2 seeds" in text[0]
    assert "lookahead: distance 3.00 -> 3.00, lower for 1 of 2 seeds" in text[2]
    assert table(lines)[2] == "| equal | FIFO, plain | 3.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |"
