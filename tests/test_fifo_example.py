"""The example of FIFO on video: it runs to its end and resumes, and counts as it says."""

import pytest
import torch
from PIL import Image

from examples import fifo_long_video, quality
from vattn.models.video_dit import VideoDiT


@pytest.mark.slow
def test_runs_to_its_end_on_ones_own_videos_and_resumes(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fifo_long_video, "SMALLER", fifo_long_video.Size(16, 1))
    arguments = ["--videos", str(videos), "--fps", "5", "--steps", "2", "--size", "16", "--frames", "9"]
    arguments += ["--short", "--outputs", str(tmp_path)]
    assert fifo_long_video.main(arguments) == 0
    with Image.open(tmp_path / "fifo_videos.gif") as picture:
        assert picture.n_frames == 9 and picture.width == 3 * 8 * 16
    assert (tmp_path / "fifo_videos.mp4").stat().st_size > 0
    for name in ("queue", "memory", "loss"):
        assert (tmp_path / f"fifo_{name}.png").stat().st_size > 0
    printed = capsys.readouterr().out
    for part in (
        "distance of frame statistics",
        "read 2 videos with 128 frames",
        "\nright.mp4 ",
        "9 frames, 1.12 times the length of training",
        "MiB at the first frame",
    ):
        assert part in printed
    saved = torch.load(tmp_path / "fifo_denoiser.pt", weights_only=True)
    model = VideoDiT.from_pretrained(tmp_path / "fifo_denoiser")
    assert saved["step"] == 2 and model.num_classes == 2
    assert all(torch.equal(x, saved["model"][name]) for name, x in model.state_dict().items())

    monkeypatch.delattr(VideoDiT, "training_loss")  # there is nothing left to train
    assert fifo_long_video.main([*arguments, "--resume"]) == 0


def test_batches_are_windows_of_the_videos_that_they_name():
    videos = [torch.arange(float(start), start + 30).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) for start in (0, 100)]
    torch.manual_seed(0)
    seen = [next(fifo_long_video.batches(videos)) for _ in range(40)]
    batch, classes = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert batch.shape == (240, 3, 8, 2, 2) and classes.unique().tolist() == [0, 1]
    assert torch.equal(batch[:, 0, 0, 0, 0] >= 100, classes == 1)
    assert (batch.diff(dim=2) == 1).all()
    assert len(batch[classes == 0, 0, 0, 0, 0].unique()) == 23


class TestStatistics:
    """Of frames, and how far they are from those of others."""

    def test_of_normal_distributions(self):
        """sqrt of |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), which for diagonal ones is known."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
        y = x.flip(0) * torch.tensor([2.0, 1.0, 0.0]) + torch.tensor([0.0, 3.0, 0.0])
        assert quality.frechet_distance(x, y) == pytest.approx((1 + 9 + 1) ** 0.5, rel=0.02)
        assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
        assert quality.frechet_distance(x, y) == pytest.approx(quality.frechet_distance(y, x))

    def test_of_frames(self):
        video = torch.zeros(3, 2, 8, 8)
        video[0, 0, :4, :4] = 1.0
        video[1, 1, :, ::2] = 1.0
        statistics = quality.frame_statistics(video)
        assert statistics.shape == (2, 24)
        assert statistics[0, :4].tolist() == [1, 0, 0, 0]  # quarters of the first channel
        columns = statistics[1].view(-1)[[4, 5, 6, 7]]
        assert columns.tolist() == [0.5] * 4
        rows, along = statistics[:, 15:18], statistics[:, 18:21]
        assert rows[1, 1] == 0 and along[1, 1] == 1

    def test_jumps(self):
        video = torch.tensor([0.0, 1.0, 1.0, -1.0]).view(1, 4, 1, 1).expand(3, -1, 2, 2)
        assert quality.jumps(video).tolist() == [1, 0, 2]
