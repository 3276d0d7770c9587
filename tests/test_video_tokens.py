"""The example of tokens: it runs to its end and resumes, and measures what it says."""

import math
import re

import pytest
import torch
from PIL import Image
from torch import nn

from examples import clips, mebt_video, quality, video_tokens
from vattn.models.videogpt import VideoGPT


def test_runs_to_its_end_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clips, "NAMES", ("carphone_pristine",))
    monkeypatch.setattr(video_tokens, "NUM_WINDOWS", 16)
    monkeypatch.setitem(mebt_video.SAMPLING, "num_steps", 2)
    monkeypatch.setattr(video_tokens, "NEEDS", video_tokens.NEEDS._replace(steps=2))
    arguments = ["--steps", "2", "--size", "16", "--outputs", str(tmp_path)]
    assert video_tokens.main(arguments) == 1  # two steps are not enough
    for name in ("reconstruction", "samples"):
        with Image.open(tmp_path / f"tokens_{name}.gif") as picture:
            assert picture.n_frames > 1
    assert (tmp_path / "tokens_loss.png").exists()
    printed, error = capsys.readouterr()
    assert "FAILED: the VQ-VAE has not learned enough to beat both baselines" in error
    assert re.search(r"VQ-VAE, 64 codes +\d+\.\d\d dB +\d\.\d{3}\n", printed)
    assert re.search(r"VideoGPT +64 +\d+\.\d\d\nMeBT +2 +\d+\.\d\d\n", printed)  # network calls, seconds
    video_tokens.main([*arguments, "--resume"])
    again = capsys.readouterr().out
    assert strip_seconds(again) == strip_seconds(printed)


def test_the_short_version_trains_no_priors_and_does_not_fail(videos, tmp_path, capsys):
    arguments = ["--short", "--videos", str(videos), "--steps", "2", "--size", "16", "--outputs", str(tmp_path)]
    assert video_tokens.main(arguments) == 0
    printed, error = capsys.readouterr()
    assert "has not learned enough to beat both baselines, which takes more steps than these 2\n" in printed
    assert "FAILED" not in error and "VideoGPT" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokens_loss.png",
        "tokens_reconstruction.gif",
        "tokens_reconstruction.mp4",
        "tokens_vqvae",
        "tokens_vqvae.pt",
    ]


def strip_seconds(printed):
    return re.sub(r"((VideoGPT|MeBT) +\d+) +\d+\.\d\d\n", r"\1\n", printed)


def test_structural_similarity():
    video = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    assert quality.structural_similarity(video, video) == pytest.approx(1.0, abs=1e-5)
    assert quality.structural_similarity(video, -video) < 0
    black, grey = torch.full((1, 1, 1, 12, 12), -1.0), torch.zeros(1, 1, 1, 12, 12)
    c1 = 0.01**2  # without variance, what remains compares the means, here 0 and a half of the range
    assert quality.structural_similarity(black, grey) == pytest.approx(c1 / (0.25 + c1), rel=1e-3)


def test_shrinking_keeps_averages():
    video = torch.rand(1, 3, 4, 8, 8)
    small = quality.shrink_and_enlarge(video, (1, 1, 1))
    torch.testing.assert_close(small, video.mean((2, 3, 4), keepdim=True).expand_as(video))
    flat = torch.full((1, 3, 4, 8, 8), 0.25)
    torch.testing.assert_close(quality.shrink_and_enlarge(flat, (2, 3, 5)), flat)


def test_baselines_have_as_many_numbers_as_they_say(monkeypatch):
    grids = []

    def record(videos, grid):
        grids.append(math.prod(grid) * video_tokens.CHANNELS)
        return videos + len(grids)

    monkeypatch.setattr(video_tokens, "shrink_and_enlarge", record)
    shown = video_tokens.baselines(torch.zeros(1, 3, 16, 32, 32), codes=256)
    assert list(shown) == ["bilinear, 768 numbers", "bilinear, 256 numbers"]
    assert grids[-1] == 768 and 200 < max(grids[:-1]) <= 256


def test_bits_of_a_model_that_knows_nothing():
    model = VideoGPT(video_tokens.NUM_CODES, 4, (2, 2, 2), dim=12, num_heads=2, num_layers=1)
    codes = torch.zeros(3, 2, 2, 2, dtype=torch.int64)
    learned, alone = video_tokens.bits(model, codes, seen=codes)
    assert learned == pytest.approx(8.0)
    assert alone == pytest.approx(-math.log2(25 / (24 + 256)), rel=1e-5)


def test_calls_are_counted():
    head = nn.Linear(2, 2)
    codes, seconds, calls = video_tokens.time_sampling(lambda: head(head(torch.ones(4, 2))), head)
    assert calls == 2 and seconds > 0 and not head._forward_hooks and len(codes) == 4
