"""The benchmark of the layouts of video models."""

import re

import pytest
import torch

from benchmarks import records, video_layouts
from benchmarks.video_layouts import OPERATOR, VideoCase
from vattn import BlockLayout

EAGER = ["vattn", "sdpa", "gather"]
PROVIDERS = {provider.name: provider for provider in OPERATOR.providers}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", EAGER)
def test_tiles_of_consecutive_tokens(name):
    case = VideoCase("sliding_tile", (2, 2, 6), (1, 2, 6), (1, 1, 1), D=8)
    leaves = [torch.randn(shape) for shape in case.leaf_shapes]
    torch.testing.assert_close(PROVIDERS[name].build(case, CPU)(*leaves), case.reference(*leaves))


@pytest.mark.parametrize("name", ["gather", "flex"])
def test_what_a_copy_of_tiles_cannot_do_is_said(name):
    short = VideoCase("sliding_tile", (5, 2), (2, 2), (1, 1), D=8)
    with pytest.raises(ValueError, match=re.escape("VideoCase: tile must divide grid (5, 2) for this provider")):
        PROVIDERS[name].build(short, CPU)
    rows = VideoCase("neighborhood", (6, 2), (2, 2), (3, 1), D=8)
    if name == "gather":
        with pytest.raises(ValueError, match="VideoCase: every tile must read as many for this provider"):
            PROVIDERS[name].build(rows, CPU)


def test_the_default_cases_have_about_8_000_tokens_and_a_tenth_of_the_pairs():
    for case in OPERATOR.cases["default"]:
        assert 8000 <= case.N <= 8192 and 0.09 < case.density < 0.12


def test_the_command_line_measures_and_stores(tmp_path, capsys):
    arguments = ["--cases", "quick", "--providers", *EAGER, "--rounds", "1", "--results", str(tmp_path)]
    assert video_layouts.main(arguments) == 0
    lines = records.load("video_layouts", tmp_path)
    passes = ["forward", "forward+backward"]
    assert [(line.pass_name, line.provider, line.reason) for line in lines] == [
        (pass_name, name, None) for pass_name in passes for name in EAGER
    ]
    assert "forward+backward: sdpa / vattn" in capsys.readouterr().out


def test_the_command_line_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit):
        video_layouts.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def test_the_table_of_build_times(monkeypatch, capsys):
    monkeypatch.setattr(video_layouts, "BUILDS", {"dense": lambda: BlockLayout.dense(8, 4)})
    assert video_layouts.main(["--build"]) == 0
    title, row = capsys.readouterr().out.splitlines()
    assert title.split()[-4:] == ["blocks", "entries", "density", "time"]
    assert row.split()[:4] == ["dense", "2", "4", "100.0%"]
