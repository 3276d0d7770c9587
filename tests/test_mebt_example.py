"""The example of MeBT on video: it runs to its end, and counts as it says."""

import av
import pytest
import torch
from PIL import Image
from torch import nn

from examples import clips, mebt_video
from vattn.models.mebt import MeBT
from vattn.models.vqvae import VQGAN


def test_runs_to_its_end_on_ones_own_videos(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mebt_video, "EVALUATIONS", 1)
    monkeypatch.setitem(mebt_video.SAMPLING, "num_steps", 2)
    monkeypatch.setattr(mebt_video, "NUM_WINDOWS", 8)
    arguments = ["--videos", str(videos), "--steps", "2", "--size", "16", "--outputs", str(tmp_path)]
    assert mebt_video.main(arguments) == 0
    for name in ("reconstruction", "generation", "continuation", "inpainting"):
        with Image.open(tmp_path / f"mebt_{name}.gif") as picture:
            assert picture.n_frames == 16
        with av.open(str(tmp_path / f"mebt_{name}.mp4")) as container:
            assert container.streams.video[0].frames == 16
    assert (tmp_path / "mebt_loss.png").exists()
    printed, complaint = capsys.readouterr()
    assert "2 steps: needs about 1 min and" in printed and "read 2 videos with 256 frames\n" in printed
    assert "dB PSNR" in printed and all(name in printed for name in mebt_video.ANSWERS)
    assert "MeBT has not learned enough" in printed  # after two steps, it knows less than a copy
    assert "FAILED" not in complaint
    models = [torch.load(tmp_path / f"mebt_{name}.pt", weights_only=True) for name in ("tokenizer", "model")]
    assert [model["step"] for model in models] == [2, 2]
    loaded = MeBT.from_pretrained(tmp_path / "mebt_model"), VQGAN.from_pretrained(tmp_path / "mebt_tokenizer")
    for model, saved in zip(loaded, models[::-1], strict=True):
        assert all(torch.equal(x, saved["model"][name]) for name, x in model.state_dict().items())


def test_accuracies_of_a_known_video():
    codes = torch.tensor([1, 1, 2, 2]).view(1, 4, 1, 1).expand(3, 4, 5, 5)  # one code a frame

    def model(codes, context, target):  # says 2 everywhere
        return nn.functional.one_hot(torch.full_like(target, 2), 4).float()

    share = mebt_video.accuracies(model, codes, 1, ratios=[1.0, 1.0], generator=torch.Generator().manual_seed(0))
    assert share == pytest.approx(dict(zip(mebt_video.ANSWERS, (2 / 3, 1 / 3, 1 / 3, 2 / 3), strict=True)))


def test_only_known_codes_are_copied():
    codes = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]).view(1, 4, 1, 2)
    context = torch.tensor([[0, 5, 6]])  # 1, 6 and 7
    assert mebt_video.copies(codes, context, 9).view(4, 2).tolist() == [[1, 9], [1, 9], [1, 6], [7, 6]]
    assert mebt_video.copies(codes, context[:, :0], 9).unique().tolist() == [9]


@pytest.mark.slow
def test_a_still_video_is_soon_understood():
    torch.manual_seed(0)
    codes = torch.randint(8, (64, 1, 4, 4)).expand(-1, 4, -1, -1)
    model = mebt_video.small_mebt(8, (4, 4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in codes[:32].split(8) * 8:
        optimizer.zero_grad()
        model.training_loss(batch).backward()
        optimizer.step()
    share = mebt_video.accuracies(model, codes[32:], 0, ratios=[0.5], generator=torch.Generator().manual_seed(0))
    assert share["MeBT"] > share["last known code"]  # from random weights, it is at one in eight


def test_windows_stay_inside_their_clip():
    video = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    windows = clips.windows(video, 16, every=8)
    assert windows.shape == (4, 3, 16, 2, 2)
    assert windows[:, 0, 0, 0, 0].tolist() == [0, 8, 16, 24]
    assert windows[-1, 0, :, 0, 0].tolist() == [*range(24, 40)]


def test_varied_windows_lie_anywhere_and_run_both_ways():
    place = torch.arange(20.0)
    video = torch.stack(
        torch.meshgrid(place, place[:5], place[:6], indexing="ij"), 1
    )  # time, row and column of each pixel
    torch.manual_seed(0)
    batches = clips.varied_batches([video, video], 16, 4)
    batch = torch.cat([next(batches) for _ in range(20)])
    assert batch.shape == (40, 3, 16, 4, 4)
    for axis, (steps, starts) in enumerate([({1.0, -1.0}, 5), ({1.0}, 2), ({1.0, -1.0}, 3)]):
        along = batch[:, axis].movedim(axis + 1, 1)[:, :, 0, 0]
        assert set(along.diff(dim=1).unique().tolist()) == steps
        assert along.min(1).values.unique().numel() == starts
    assert torch.equal(clips.centre(video, 2), video[:, :, 1:3, 2:4])
