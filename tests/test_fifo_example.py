"""The example of FIFO on video: it runs to its end and resumes, learns from a folder, and counts as it says."""

import av
import pytest
import torch
from PIL import Image

from examples import clips, fifo_long_video, quality
from vattn.models.video_dit import VideoDiT


@pytest.mark.slow
def test_runs_to_its_end_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fifo_long_video, "SMALLER", fifo_long_video.Size(16, 1))
    arguments = ["--steps", "2", "--size", "16", "--frames", "9", "--short", "--outputs", str(tmp_path)]
    assert fifo_long_video.main(arguments) == 0
    with Image.open(tmp_path / "fifo_videos.gif") as picture:
        assert picture.n_frames == 9 and picture.width == 3 * 8 * 16
    for name in ("queue", "memory", "loss"):
        assert (tmp_path / f"fifo_{name}.png").stat().st_size > 0
    printed = capsys.readouterr().out
    for part in (
        "distance of frame statistics",
        "carphone_pristine ",
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


def write_video(path, frames):
    """A grey video, each frame a little lighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(frames):
            grey = torch.full((16, 32, 3), 20 * i, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


def test_videos_of_a_folder(tmp_path):
    for name, frames in (("b.mp4", 9), ("a.MKV", 8), ("short.mp4", 7)):
        write_video(tmp_path / name, frames)
    (tmp_path / "notes.txt").write_text("no video")
    videos = clips.of_folder(tmp_path, 8, 8)
    assert {name: tuple(video.shape) for name, video in videos.items()} == {"a": (8, 3, 8, 8), "b": (9, 3, 8, 8)}
    expected = torch.arange(9) * 20 / 127.5 - 1
    torch.testing.assert_close(videos["b"].mean((1, 2, 3)), expected, atol=0.05, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"has no video of 10 frames or more, of \.avi, "):
        clips.of_folder(tmp_path, 8, 10)


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
