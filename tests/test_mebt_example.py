"""The example of MeBT on video: it runs to its end, resumes where it stopped, and counts as it says."""

import pytest
import torch
from PIL import Image
from torch import nn

from examples import clips, mebt_video, training


def test_runs_to_its_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clips, "NAMES", ("carphone_pristine",))
    monkeypatch.setattr(mebt_video, "EVALUATIONS", 1)
    monkeypatch.setitem(mebt_video.SAMPLING, "num_steps", 2)
    mebt_video.main(["--steps", "2", "--size", "16", "--outputs", str(tmp_path)])
    for name in ("reconstruction", "generation", "continuation", "inpainting"):
        with Image.open(tmp_path / f"mebt_{name}.gif") as picture:
            assert picture.n_frames > 1
    assert (tmp_path / "mebt_loss.png").exists()
    printed = capsys.readouterr().out
    assert "dB PSNR" in printed and "code of the frame before" in printed
    models = [torch.load(tmp_path / f"mebt_{name}.pt", weights_only=True) for name in ("tokenizer", "model")]
    assert [model["step"] for model in models] == [2, 2]


def small_training(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    return training.Training("small", model, 6, 0.1, path)


def numbers():
    while True:
        yield torch.randn(4, 3)


def test_resumed_training_is_the_same(tmp_path):
    whole = small_training(tmp_path / "whole.pt")
    whole.run(numbers(), lambda batch: whole.model(batch).square().mean())

    part = small_training(tmp_path / "part.pt")
    assert not part.resume()
    part.run(numbers(), lambda batch: part.model(batch).square().mean(), until=3)
    rest = small_training(tmp_path / "part.pt")
    assert rest.resume() and rest.step == 3
    rest.run(numbers(), lambda batch: rest.model(batch).square().mean())

    assert rest.losses == whole.losses
    torch.testing.assert_close(rest.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_accuracies_of_a_known_video():
    codes = torch.tensor([1, 1, 2, 2]).view(1, 4, 1, 1).expand(3, 4, 5, 5)  # one code a frame

    def model(codes, context, target):  # says 2 everywhere
        return nn.functional.one_hot(torch.full_like(target, 2), 4).float()

    share = mebt_video.accuracies(model, codes, frequent=1, ratio=1.0, generator=torch.Generator().manual_seed(0))
    assert share == pytest.approx({"MeBT": 2 / 3, "most frequent": 1 / 3, "copy": 2 / 3})


def test_windows_stay_inside_their_clip():
    video = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    windows = clips.windows(video, 16, every=8)
    assert windows.shape == (4, 3, 16, 2, 2)
    assert windows[:, 0, 0, 0, 0].tolist() == [0, 8, 16, 24]
    assert windows[-1, 0, :, 0, 0].tolist() == [*range(24, 40)]
