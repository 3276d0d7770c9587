"""Training on one's own videos: files are read and written, and a resumed training is the uninterrupted one."""

import itertools
import os
import pickle
import shutil
import signal
import threading
import wave
from fractions import Fraction

import av
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from examples import clips as examples_clips
from vattn.training import Training, VideoClips, read_video, video_files, warmup_cosine, write_video
from vattn.training.clips import frame_times


def counting(frames, height=16, width=32):
    """Frames of one grey each, 5 lighter than the one before: what a frame shows is its number."""
    return (5 * torch.arange(frames, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, height, width, 3).contiguous()


def numbers(video):
    return [round(float(frame.float().mean()) / 5) for frame in video.transpose(0, 1)]


def encode(path, codec, frames=40, rate=10, pix_fmt="yuv420p", times=None, rotation=0, **options):
    """A file of `codec` in the container that its name asks for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = 16, 32, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(counting(frames)):
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24").reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


CONTAINERS = {
    "a.mp4": {"codec": "libx264"},
    "b.mkv": {"codec": "libx264", "g": "10"},
    "c.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},  # has no times of presentation
    "d.webm": {"codec": "libvpx-vp9", "rate": 30},  # rounds times to milliseconds
    "e.ts": {"codec": "libx264", "g": "10"},  # seeks too far
    "f.y4m": {"codec": "wrapped_avframe"},
    "g.mpg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "h.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(tmp_path, name):
    rate = CONTAINERS[name].get("rate", 10)
    encode(tmp_path / name, **CONTAINERS[name])
    whole = read_video(tmp_path / name)
    assert whole.shape == (3, 40, 16, 32) and whole.dtype == torch.uint8
    assert numbers(whole) == pytest.approx(range(40), abs=1)
    times = frame_times(tmp_path / name)
    assert times == pytest.approx([i / rate for i in range(40)], abs=1e-3)
    assert VideoClips([tmp_path / name], 40, (16, 32), fps=rate)[0].equal(whole)  # as long as the video
    for first in (1, 17, 37):
        part = read_video(tmp_path / name, start=times[first], num_frames=3)
        assert torch.equal(part, whole[:, first : first + 3])
        every_second = read_video(tmp_path / name, start=times[first - 1], num_frames=2, fps=rate / 2)
        assert torch.equal(every_second, whole[:, first - 1 : first + 2 : 2])


def test_a_stream_without_times_can_be_read_but_not_indexed(tmp_path):
    encode(tmp_path / "raw.h264", "libx264", rate=25)
    whole = read_video(tmp_path / "raw.h264")
    assert whole.shape[1] == 40
    assert torch.equal(read_video(tmp_path / "raw.h264", start=0.4, num_frames=2), whole[:, 10:12])
    with pytest.raises(ValueError, match=r"frames that have a time, got path=.*raw\.h264"):
        frame_times(tmp_path / "raw.h264")


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, range(12)),
        (10, range(12)),
        (5, range(0, 12, 2)),
        (20, [i // 2 for i in range(24)]),
        (4, [0, 2, 5, 8, 10]),
    ],
)
def test_rates(tmp_path, fps, expected):
    write_video(tmp_path / "video.mp4", counting(12))
    assert numbers(read_video(tmp_path / "video.mp4", fps=fps)) == pytest.approx([*expected], abs=1)


def test_frames_of_changing_length(tmp_path):
    encode(tmp_path / "video.mkv", "libx264", frames=4, times=[0, 1, 6, 7])
    whole = read_video(tmp_path / "video.mkv")
    assert frame_times(tmp_path / "video.mkv") == pytest.approx([0, 0.1, 0.6, 0.7])
    at_rate = read_video(tmp_path / "video.mkv", fps=10)
    assert torch.equal(at_rate, whole[:, [0, 1, 1, 1, 2, 2, 2, 3]])


def test_videos_of_telephones_are_upright(tmp_path):
    encode(tmp_path / "upright.mp4", "mpeg4", frames=2)
    encode(tmp_path / "turned.mp4", "mpeg4", frames=2, rotation=90)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.rotation, frame.width, frame.height) == (90, 32, 16)
    assert read_video(tmp_path / "turned.mp4").shape == (3, 2, 32, 16)


def test_rotation_is_that_of_players(tmp_path):
    """The display matrix of 90 degrees turns frames counterclockwise."""
    pixels = torch.zeros(1, 16, 32, 3, dtype=torch.uint8)
    pixels[:, :, :16] = 255  # the left half
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[0].numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    turned = read_video(tmp_path / "turned.mp4").float().mean((0, 1, 3))
    assert turned[:14].max() < 50 and turned[18:].min() > 200  # left has become the bottom


class TestCrops:
    @pytest.fixture
    def path(self, tmp_path):
        frames = torch.zeros(2, 24, 64, 3, dtype=torch.uint8)
        frames[:, :, 20:44] = 200  # the central square
        write_video(tmp_path / "video.mp4", frames)
        return tmp_path / "video.mp4"

    def test_the_centre(self, path):
        video = read_video(path, size=12)
        assert video.shape == (3, 2, 12, 12) and video[..., 1:-1].min() > 180
        assert read_video(path, size=(8, 32)).shape == (3, 2, 8, 32)

    def test_at_random(self, path):
        torch.manual_seed(0)
        found = [read_video(path, size=12, crop="random") for _ in range(8)]
        assert all(video.shape == (3, 2, 12, 12) for video in found)
        assert all(torch.equal(video[:, 0], video[:, 1]) for video in found)  # one part for all frames
        assert len(torch.stack(found).unique(dim=0)) > 4
        torch.manual_seed(0)
        assert torch.equal(read_video(path, size=12, crop="random"), found[0])


class TestReadingIsRefused:
    @pytest.fixture
    def path(self, tmp_path):
        write_video(tmp_path / "video.mp4", counting(8))
        return tmp_path / "video.mp4"

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"read_video: path must be a file, got path=.*none\.mp4"):
            read_video(tmp_path / "none.mp4")

    @pytest.mark.parametrize("read", [read_video, frame_times])
    def test_no_video(self, tmp_path, read):
        (tmp_path / "notes.mp4").write_text("no video")
        with pytest.raises(
            ValueError, match=r"must be a video that PyAV can read, got path=.*notes\.mp4 \(Invalid data"
        ):
            read(tmp_path / "notes.mp4")

    def test_sound_alone(self, tmp_path):
        with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(1000))
        with pytest.raises(ValueError, match=r"must be a file with a video stream, got path=.*sound\.wav"):
            read_video(tmp_path / "sound.wav")

    def test_too_few_frames(self, path):
        with pytest.raises(ValueError, match=r"at least 7 frames at fps=5 from start=0\.2 on, got 3 from path=.*video"):
            read_video(path, start=0.2, num_frames=7, fps=5)
        with pytest.raises(ValueError, match=r"at least 1 frames from start=9 on, got 0 from"):
            read_video(path, start=9)
        with pytest.raises(ValueError, match=r"at least 9 frames, got 8 in 0\.7 s from .*video\.mp4"):
            VideoClips([path], 9, 8)[0]
        with pytest.raises(ValueError, match=r"at least 5 frames at fps=5, got 8 in 0\.7 s from .*video\.mp4"):
            VideoClips([path], 5, 8, fps=5)[0]

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"size": 0}, ValueError, "size must be at least 1, got size=0"),
            ({"size": (1, 2, 3)}, ValueError, r"size must be \(H, W\) or one number for both, got size=\(1, 2, 3\)"),
            ({"size": 1.5}, TypeError, "size must be an int, got size=1.5"),
            ({"fps": 0}, ValueError, "fps must be above 0, got fps=0"),
            ({"start": -1}, ValueError, "start must be at least 0, got start=-1"),
            ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got num_frames=0"),
            ({"crop": "left"}, ValueError, "crop must be one of centre, random, got crop='left'"),
        ],
    )
    def test_settings(self, path, settings, error, message):
        with pytest.raises(error, match=f"read_video: {message}"):
            read_video(path, **settings)

    def test_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"video_files: folder must be a folder, got folder=.*none"):
            video_files(tmp_path / "none")
        (tmp_path / "notes.txt").write_text("no video")
        with pytest.raises(FileNotFoundError, match=r"must have files that end with one of \.3gp .* got folder="):
            VideoClips(tmp_path, 4, 8)
        with pytest.raises(
            ValueError, match=r"VideoClips: videos must be a folder or at least one file, got videos=\[\]"
        ):
            VideoClips([], 4, 8)


def test_clips_of_a_folder(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.mp4", "a.MP4", "more/c.gif"):
        write_video(tmp_path / name, counting(12))
    (tmp_path / "notes.txt").write_text("no video")
    clips = VideoClips(tmp_path, 4, (8, 16))
    assert [path.name for path in clips.files] == ["a.MP4", "b.mp4", "c.gif"] and len(clips) == 3
    torch.manual_seed(0)
    seen = [numbers(clips[0]) for _ in range(60)]
    assert {first for first, *_ in seen} == {*range(9)}
    assert all(clip == pytest.approx([*range(clip[0], clip[0] + 4)], abs=1) for clip in seen)
    assert pickle.loads(pickle.dumps(clips)).files == clips.files  # for workers that are spawned
    slower = VideoClips([tmp_path / "b.mp4"], 4, 8, fps=5)
    seen = [numbers(slower[0]) for _ in range(40)]
    assert {first for first, *_ in seen} == {*range(6)}
    assert all(clip == pytest.approx([*range(clip[0], clip[0] + 8, 2)], abs=1) for clip in seen)


class TestWriting:
    @pytest.mark.parametrize("suffix", ["mp4", "gif"])
    @pytest.mark.parametrize("size", [(16, 32), (15, 33), (1, 1)])
    def test_round_trips(self, tmp_path, suffix, size):
        frames = counting(7, *size)
        whole = [frames, frames / 255, frames.movedim(-1, 0), (frames / 255).half().movedim(-1, 0)]
        read = []
        for given in whole:
            write_video(tmp_path / f"video.{suffix}", given, fps=20)
            read.append(read_video(tmp_path / f"video.{suffix}"))
        even = [pixels + (suffix == "mp4") * pixels % 2 for pixels in size]
        assert all(torch.equal(video, read[0]) for video in read)
        assert read[0].shape == (3, 7, *even) and numbers(read[0]) == pytest.approx(range(7), abs=1)
        assert frame_times(tmp_path / f"video.{suffix}") == pytest.approx([i / 20 for i in range(7)])

    def test_colours_stay(self, tmp_path):
        frames = torch.zeros(4, 16, 16, 3)
        frames[..., 0], frames[..., 2] = 1.0, 0.5
        for suffix in ("mp4", "gif"):
            write_video(tmp_path / f"video.{suffix}", frames)
            found = read_video(tmp_path / f"video.{suffix}").float().mean((1, 2, 3))
            torch.testing.assert_close(found, torch.tensor([255.0, 0.0, 127.5]), atol=3, rtol=0)

    @pytest.mark.parametrize(
        ("name", "frames", "error", "message"),
        [
            ("a.mov", torch.zeros(1, 2, 2, 3), ValueError, r"path must end with \.mp4 or \.gif, got path=.*a\.mov"),
            ("a.mp4", [1], TypeError, "frames must be a uint8 or floating-point tensor, got frames=list"),
            ("a.mp4", torch.zeros(1, 2, 2, 3, dtype=torch.int64), TypeError, "got frames.dtype=torch.int64"),
            (
                "a.mp4",
                torch.zeros(2, 2, 3),
                ValueError,
                r"\(T, H, W, 3\) or \(3, T, H, W\), got frames.shape=\(2, 2, 3\)",
            ),
            ("a.mp4", torch.zeros(4, 2, 2, 4), ValueError, r"got frames.shape=\(4, 2, 2, 4\)"),
            ("a.gif", torch.zeros(0, 2, 2, 3), ValueError, r"got frames.shape=\(0, 2, 2, 3\)"),
            ("a.mp4", torch.zeros(1, 2, 2, 3) - 1, ValueError, "from 0 to 1 .* got values from frames=-1 to frames=-1"),
            ("a.mp4", torch.full((1, 2, 2, 3), torch.nan), ValueError, "got values from frames=nan"),
        ],
    )
    def test_what_is_refused(self, tmp_path, name, frames, error, message):
        with pytest.raises(error, match=f"write_video: .*{message}"):
            write_video(tmp_path / name, frames)
        assert not (tmp_path / name).exists()

    def test_rates(self, tmp_path):
        with pytest.raises(ValueError, match="write_video: fps must be above 0, got fps=0"):
            write_video(tmp_path / "a.mp4", counting(2), fps=0)


def small_training(path, seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Training(model, optimizer, path, **{"steps": 12, "progress": False, **settings})


class Noisy(Dataset):
    """Items that also draw, as augmentations do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((3,), float(index)) + torch.randn(3)


def endless():
    while True:
        yield torch.randn(4, 3)


def square(training):
    return lambda batch: training.model(batch).square().mean()


def loader(**settings):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **settings)


class TestResumed:
    @pytest.mark.parametrize("stop", [1, 3, 7])
    @pytest.mark.parametrize("batches", [endless, loader], ids=["iterator", "loader"])
    def test_training_is_the_uninterrupted_one(self, tmp_path, batches, stop):
        whole = small_training(tmp_path / "whole.pt")
        whole.run(batches(), square(whole))

        part = small_training(tmp_path / "part.pt")
        assert not part.resume()
        part.run(batches(), square(part), until=stop)
        rest = small_training(tmp_path / "part.pt", seed=1)
        assert rest.resume() and rest.step == stop
        rest.run(batches(), square(rest))

        assert rest.losses == whole.losses and len(whole.losses) == 12
        torch.testing.assert_close(rest.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
        assert not rest.model.training

    @pytest.mark.slow
    def test_with_workers(self, tmp_path):
        settings = {"num_workers": 1, "multiprocessing_context": "fork"}
        whole = small_training(tmp_path / "whole.pt", steps=5)
        whole.run(loader(**settings), square(whole))
        part = small_training(tmp_path / "part.pt", steps=5)
        part.run(loader(**settings), square(part), until=2)
        part.run(loader(**settings), square(part))  # the same process may go on, too
        assert part.losses == whole.losses

    def test_given_generators(self, tmp_path):
        def drawn(generator):
            while True:
                yield torch.randn(4, 3, generator=generator)

        losses = []
        for stops in ((12,), (5, 12)):
            path = tmp_path / f"{len(stops)}.pt"
            for seed, stop in enumerate(stops):
                generator = torch.Generator().manual_seed(seed)
                training = small_training(path, generators=[generator])
                training.resume()
                training.run(drawn(generator), square(training), until=stop)
            losses.append(training.losses)
        assert losses[0] == losses[1]
        with pytest.raises(ValueError, match=r"as many as in the checkpoint, 1, got len\(generators\)=0"):
            small_training(path).resume()

    def test_learning_rates_of_groups(self, tmp_path):
        model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        seen = []
        for until in (2, 4):
            rates = zip(model, (0.1, 0.2), strict=True)
            optimizer = torch.optim.SGD([{"params": part.parameters(), "lr": rate} for part, rate in rates])
            training = Training(model, optimizer, tmp_path / "x.pt", steps=4, progress=False, max_norm=None)
            training.resume()

            def loss_of(batch, optimizer=optimizer):
                seen.append([group["lr"] for group in optimizer.param_groups])
                return model[0](batch).mean() + model[1](batch).mean()

            training.run(itertools.repeat(torch.ones(1, 1)), loss_of, until=until)
        assert seen == [[0.1 * warmup_cosine(i, 4), 0.2 * warmup_cosine(i, 4)] for i in range(4)]


class TestCheckpoints:
    def test_an_unfinished_one_leaves_the_last(self, tmp_path, monkeypatch):
        training = small_training(tmp_path / "folder" / "x.pt", save_every=2)
        training.run(endless(), square(training), until=2)
        before = training.path.read_bytes()

        def fail(state, file):
            file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            training.run(endless(), square(training))
        assert training.path.read_bytes() == before and training.step == 4

    def test_they_hold_no_code(self, tmp_path):
        training = small_training(tmp_path / "x.pt")
        training.run(loader(), square(training), until=2)
        assert torch.load(training.path, weights_only=True)["step"] == 2

    @pytest.mark.parametrize("content", [b"no checkpoint", None])
    def test_another_file_is_refused(self, tmp_path, content):
        path = tmp_path / "x.pt"
        torch.save({"model": {}}, path) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path must be a checkpoint of Training, got path=.*x\.pt"):
            small_training(path).resume()

    def test_damaged_weights_are_refused(self, tmp_path):
        """PyTorch reads a checkpoint whose bytes changed on the disk, checksums or not."""
        whole = small_training(tmp_path / "x.pt")
        whole.run(endless(), square(whole))
        data = bytearray(whole.path.read_bytes())
        weight = next(iter(whole.model.parameters())).detach().numpy().tobytes()
        at = bytes(data).index(weight)
        data[at] ^= 1
        whole.path.write_bytes(data)
        fresh = small_training(tmp_path / "x.pt", seed=1)
        with pytest.raises(ValueError, match=r"path must be a checkpoint of Training, got path=.*is damaged"):
            fresh.resume()
        assert fresh.step == 0


class TestInterrupted:
    @pytest.fixture(autouse=True)
    def in_the_foreground(self):
        """A shell lets the programs that it starts in the background ignore Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_ctrl_c_ends_the_step_and_saves(self, tmp_path):
        whole = small_training(tmp_path / "whole.pt")
        whole.run(endless(), square(whole))
        part = small_training(tmp_path / "part.pt")

        def interrupted(batch):
            if part.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return square(part)(batch)

        with pytest.raises(KeyboardInterrupt):
            part.run(endless(), interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        rest = small_training(tmp_path / "part.pt", seed=1)
        assert rest.resume() and rest.step == 5
        rest.run(endless(), square(rest))
        assert rest.losses == whole.losses

    def test_a_second_one_is_at_once(self, tmp_path):
        training = small_training(tmp_path / "x.pt")
        training.run(endless(), square(training), until=3)

        def interrupted(batch):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

        with pytest.raises(KeyboardInterrupt):
            training.run(endless(), interrupted)
        assert training.step == 3 and torch.load(training.path, weights_only=True)["step"] == 3

    def test_a_thread_trains_too(self, tmp_path):
        training = small_training(tmp_path / "x.pt")
        thread = threading.Thread(target=training.run, args=(endless(), square(training)))
        thread.start()
        thread.join()
        assert training.step == 12


class TestRunIsRefused:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (
                lambda: iter([torch.ones(2, 3)]),
                "batches must be endless if it is an iterator, got the last one before step 1",
            ),
            (list, "batches must yield at least one batch, got none"),
            (lambda: [torch.full((2, 3), torch.nan)], "losses must be finite, got loss=nan in step 0"),
        ],
    )
    def test_batches(self, tmp_path, batches, message):
        training = small_training(tmp_path / "x.pt")
        with pytest.raises(ValueError, match=rf"Training\.run: {message}"):
            training.run(batches(), square(training))
        assert not training.path.exists()

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"steps": -1}, ValueError, "steps must be at least 0, got steps=-1"),
            ({"save_every": 0}, ValueError, "save_every must be at least 1, got save_every=0"),
            ({"max_norm": 0}, ValueError, "max_norm must be above 0, got max_norm=0"),
            ({"schedule": 3}, TypeError, "schedule must be a function of a step and of steps, got schedule=3"),
            ({"generators": [3]}, TypeError, r"generators\[0\] must be a torch.Generator, got generators\[0\]=3"),
            ({"generators": 3}, TypeError, "generators must be a list or tuple, got generators=3"),
        ],
    )
    def test_settings(self, tmp_path, settings, error, message):
        with pytest.raises(error, match=f"Training: {message}"):
            small_training(tmp_path / "x.pt", **settings)

    @pytest.mark.parametrize(
        ("call", "given", "error", "message"),
        [
            (small_training, (3,), TypeError, "Training: path must be a string or a path, got path=3"),
            (
                small_training("x.pt").run,
                ([], None, "x"),
                TypeError,
                "Training.run: until must be an int, got until='x'",
            ),
            (warmup_cosine, (1, 0), ValueError, "warmup_cosine: steps must be at least 1, got steps=0"),
            (warmup_cosine, (-1, 1), ValueError, "warmup_cosine: step must be at least 0, got step=-1"),
            (VideoClips, (3, 4, 8), TypeError, "VideoClips: videos must be a folder or a list of files, got "),
            (VideoClips, ([3], 4, 8), TypeError, "VideoClips: videos must be a string or a path, got videos=3"),
            (video_files, (3,), TypeError, "video_files: folder must be a string or a path, got folder=3"),
            (read_video, (3,), TypeError, "read_video: path must be a string or a path, got path=3"),
            (write_video, (3, counting(1)), TypeError, "write_video: path must be a string or a path, got path"),
        ],
    )
    def test_wrong_arguments(self, call, given, error, message):
        with pytest.raises(error, match=f"^{message}"):
            call(*given)

    def test_what_is_no_model(self, tmp_path):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(TypeError, match="Training: model must be a torch Module, got model=int"):
            Training(3, optimizer, tmp_path / "x.pt", steps=1)
        with pytest.raises(TypeError, match="Training: optimizer must be a torch Optimizer, got optimizer=Linear"):
            Training(model, model, tmp_path / "x.pt", steps=1)


class TestClipsOfExamples:
    """What examples load of a folder, and how much of it they take at once."""

    def test_short_videos_are_left_out(self, videos, tmp_path, capsys):
        write_video(tmp_path / "short.mp4", counting(7))
        shutil.copy(videos / "left.mp4", tmp_path)
        loaded = examples_clips.load(8, tmp_path, fps=5, num_frames=8)
        assert {name: tuple(video.shape) for name, video in loaded.items()} == {"left.mp4": (64, 3, 8, 8)}
        assert "left out, as they have fewer than 8 frames: short.mp4" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"a video of 65 frames or more, got shorter ones: left\.mp4, short\.mp4"):
            examples_clips.load(8, tmp_path, fps=5, num_frames=65)

    def test_many_videos_are_taken_in_turns(self):
        many = [torch.full((20, 3, 8, 8), float(i)) for i in range(20)]
        torch.manual_seed(0)
        batch = next(examples_clips.varied_batches(many, 4, 8))
        assert batch.shape == (8, 3, 4, 8, 8) and len(batch[:, 0, 0, 0, 0].unique()) == 8
        assert len(examples_clips.take(examples_clips.varied_batches(many, 4, 8), 24)) == 24
        parts = examples_clips.some_windows(many, 4, every=2, most=40)
        assert sum(map(len, parts)) == 40 and len(examples_clips.some_windows(many, 4, every=2, most=5)) == 5
        videos = [video.to(torch.uint8) for video in many]
        clip, label = next(examples_clips.batches(videos, 4, 2, torch.Generator().manual_seed(0)))
        shown = (127.5 * (clip[:, 0, 0, 0, 0] + 1)).round()
        assert torch.equal(label // 2, shown.long()) and len(label.unique()) == 6
