"""Videos longer than a model's, window by window; and VideoGPT from first codes, which is its forward, code by code."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model_zoo import MODELS, randomize
from vattn.models import mebt, videogpt
from vattn.models.mebt import MeBT
from vattn.models.videogpt import VideoGPT
from vattn.models.vqvae import VQVAE


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_mebt() -> MeBT:
    modes = ("latent_enc", "latent_self", "latent_dec", "lt2l", "latent_dec")
    return randomize(MeBT(7, (4, 2, 2), dim=16, num_heads=2, modes=modes, num_latents=3))


def tiny_videogpt(**settings: Any) -> VideoGPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_codes": 7, "code_dim": 5, "grid": (4, 2, 2), "dim": 12, "num_heads": 2}
    return randomize(VideoGPT(**sizes | {"num_layers": 2} | settings))


SYSTEMS: dict[str, Any] = {"MeBT": (mebt, tiny_mebt, {"num_steps": 2}), "VideoGPT": (videogpt, tiny_videogpt, {})}


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> Any:
    package, make, settings = SYSTEMS[request.param]
    return package, make(), settings


class TestExtendVideo:
    @pytest.mark.parametrize("given", [0, 2, 7])
    @pytest.mark.parametrize("context_frames", [None, 1])
    def test_given_frames_come_back_and_longer_videos_begin_with_shorter_ones(self, system, given, context_frames):
        package, model, settings = system
        codes = torch.randint(7, (2, given, 2, 2), generator=seeded(1))
        longest = None
        for num_frames in (13, 12, given + 1, given):
            video = package.extend_video(
                model, codes, num_frames, context_frames=context_frames, generator=seeded(), **settings
            )
            assert video.shape == (2, num_frames, 2, 2) and video.dtype == torch.int64
            assert torch.equal(video[:, :given], codes)
            longest = video if longest is None else longest
            assert torch.equal(longest[:, :num_frames], video)

    def test_at_once_or_window_by_window(self, system):
        """With one generator, and with the calls that a window is made of."""
        package, model, settings = system
        codes = torch.randint(7, (2, 4, 2, 2), generator=seeded(1))
        whole = package.extend_video(model, codes, 10, context_frames=2, generator=seeded(), **settings)
        generator, video, by_hand = seeded(), codes, codes
        for num_frames in (6, 8, 10):
            video = package.extend_video(model, video, num_frames, context_frames=2, generator=generator, **settings)
        assert torch.equal(video, whole)
        generator = seeded()
        for _ in range(3):
            known = by_hand[:, -2:]
            if package is mebt:
                window = mebt.continue_video(model, known, 4, generator=generator, **settings)
            else:
                window = videogpt.generate(model, first=known, generator=generator)
            by_hand = torch.cat([by_hand, window[:, 2:]], 1)
        assert torch.equal(by_hand, whole)
        windows = package.stream_video(model, codes, context_frames=2, generator=seeded(), **settings)
        assert torch.equal(torch.cat([codes, *itertools.islice(windows, 3)], 1), whole)

    def test_what_is_yielded_may_be_changed(self, system):
        package, model, settings = system
        codes = torch.randint(7, (1, 2, 2, 2), generator=seeded(1))
        expected = package.extend_video(model, codes, 8, generator=seeded(), **settings)[:, 2:]
        windows = package.stream_video(model, codes, generator=seeded(), **settings)
        for i, new in enumerate(itertools.islice(windows, 5)):
            start = 0 if i == 0 else 1 + i
            assert torch.equal(new, expected[:, start : start + new.shape[1]])
            new.zero_()

    def test_a_shorter_window(self, system):
        """Positions are those of the first frames of the grid."""
        package, model, settings = system
        codes = torch.randint(7, (1, 1, 2, 2), generator=seeded(1))
        windows = package.stream_video(model, codes, window=3, context_frames=1, generator=seeded(), **settings)
        assert [next(windows).shape for _ in range(3)] == [(1, 2, 2, 2)] * 3

    def test_seeds(self, system):
        package, model, settings = system
        codes = torch.randint(7, (1, 2, 2, 2), generator=seeded(1))
        videos = [package.extend_video(model, codes, 20, generator=seeded(i), **settings) for i in (0, 0, 1)]
        assert torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])

    def test_no_video(self, system):
        package, model, settings = system
        assert package.extend_video(model, torch.zeros(0, 1, 2, 2, dtype=torch.int64), 9, **settings).shape[:2] == (
            0,
            9,
        )

    def test_progress(self, system, capsys):
        package, model, settings = system
        package.extend_video(model, torch.zeros(1, 4, 2, 2, dtype=torch.int64), 8, context_frames=2, **settings)
        assert capsys.readouterr().err == ""
        package.extend_video(
            model, torch.zeros(1, 4, 2, 2, dtype=torch.int64), 8, context_frames=2, progress=True, **settings
        )
        assert "extend_video: 100%" in (shown := capsys.readouterr().err) and "2/2" in shown

    def test_window_is_all_that_a_model_sees(self):
        """Of MeBT: never more than the tokens of a window, at its first positions."""
        seen = []

        def model(codes: Tensor, context: Tensor, target: Tensor) -> Tensor:
            seen.append((codes.shape, context.tolist(), target.tolist()))
            return torch.nn.functional.one_hot(target, 6) * 100.0

        codes = torch.zeros(1, 1, 2, dtype=torch.int64)
        video = mebt.extend_video(model, codes, 5, window=3, context_frames=2, num_steps=1)
        assert [shape for shape, *_ in seen] == [(1, 6)] * 3
        assert [context for _, context, _ in seen] == [[[0, 1]], [[0, 1, 2, 3]], [[0, 1, 2, 3]]]
        assert [target for *_, target in seen] == [[[2, 3, 4, 5]], [[4, 5]], [[4, 5]]]
        assert video.tolist() == [[[0, 0], [2, 3], [4, 5], [4, 5], [4, 5]]]

    def test_another_sampler(self):
        codes = torch.randint(7, (2, 4, 2, 2), generator=seeded(1))
        video = mebt.extend_video(tiny_mebt(), codes, 9, sampler=mebt.draft_and_revise, draft_steps=2)
        assert video.shape == (2, 9, 2, 2) and torch.equal(video[:, :4], codes)

    def test_classes_and_frames(self):
        """First frames in pixels are those of each window."""
        model, tokenizer = MODELS["VideoGPT"].make(), VQVAE(7, 5, hidden=4, num_blocks=1, downsample=(1, 2, 2)).eval()
        codes, classes, seen = torch.randint(7, (2, 1, 4, 4)), torch.tensor([2, 0]), []

        def frames(known: Tensor) -> Tensor:
            seen.append(known)
            return tokenizer.decode(known)[:, :, :1].clamp(-0.5, 0.5)

        video = videogpt.extend_video(model, codes, 3, classes=classes, frames=frames, generator=seeded())
        assert video.shape == (2, 3, 4, 4)
        assert torch.equal(torch.cat(seen, 1), video[:, :2])

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"num_frames": 1}, ValueError, "num_frames must be at least 2, got num_frames=1"),
            ({"num_frames": 3.0}, TypeError, "num_frames must be an int, got num_frames=3.0"),
            ({"window": 5}, ValueError, r"window must be at most the frames of the model \(4\), got window=5"),
            ({"window": 1}, ValueError, "window must be at least 2, got window=1"),
            ({"context_frames": 0}, ValueError, "context_frames must be at least 1, got context_frames=0"),
            (
                {"context_frames": 4},
                ValueError,
                r"context_frames must be less than those of a window \(4\), got context_frames=4",
            ),
            (
                {"codes": torch.zeros(1, 2, 2, 3, dtype=torch.int64)},
                ValueError,
                r"codes must have shape \(B, T, 2, 2\), got codes.shape=\(1, 2, 2, 3\)",
            ),
            ({"codes": torch.zeros(1, 2, 2, 2)}, TypeError, "codes must be an int64 tensor, got codes.dtype=.*"),
            ({"codes": [1]}, TypeError, "codes must be an int64 tensor, got codes=list"),
            ({"foo": 1}, TypeError, "settings must be among .*temperature, .*, got foo=1"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )  # fmt: skip
    def test_bad_input(self, system, settings, error, message):
        package, model, _ = system
        arguments = {"codes": torch.zeros(1, 2, 2, 2, dtype=torch.int64), "num_frames": 9} | settings
        with pytest.raises(error, match=f"^extend_video: {message}$"):
            package.extend_video(model, **arguments)
        if "num_frames" not in settings:
            del arguments["num_frames"]
            with pytest.raises(error, match=f"^stream_video: {message}$"):  # before a window is asked for
                package.stream_video(model, **arguments)

    def test_more_bad_input(self, system):
        package, model, _ = system
        codes = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^extend_video: model must be in evaluation mode"):
            package.extend_video(model.train(), codes, 3)
        with pytest.raises(TypeError, match=r"^Draws: generator must be"):
            package.stream_video(model.eval(), codes, generator=3)

    def test_what_one_system_needs(self):
        codes = torch.zeros(1, 2, 2, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"^extend_video: window must be given for a model without a grid"):
            mebt.extend_video(lambda *_: codes, codes, 3)
        with pytest.raises(TypeError, match=r"^extend_video: frames must be a function of codes, got frames=Tensor$"):
            videogpt.extend_video(tiny_videogpt(), codes[..., None].expand(1, 2, 2, 2), 3, frames=torch.zeros(1))


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "sparse": {"attention": "sparse", "block_size": 2, "num_local_blocks": 1},
    "class": {"num_classes": 3},
}


class TestFirstCodes:
    @pytest.fixture(params=KINDS)
    def model(self, request: pytest.FixtureRequest) -> VideoGPT:
        return tiny_videogpt(**KINDS[request.param]).double()

    @pytest.mark.parametrize("length", [0, 1, 3, 8, 15])
    def test_teacher_forcing(self, model, length):
        """After all of the first codes at once, the logits of those that follow are those of the forward."""
        codes = torch.randint(7, (2, 4, 2, 2), generator=seeded())
        given = {} if model.num_classes is None else {"classes": torch.tensor([2, 0])}
        with torch.no_grad():
            expected = model(codes, **given).flatten(1, 3)
            flat, state = codes.flatten(1), model.begin(2, **given)
            model.prefill(flat[:, :length], state)
            assert state.position == length and [cache.length for cache in state.caches] == [length] * 2
            for i in range(length, 16):
                torch.testing.assert_close(model.step(flat[:, i - 1], state), expected[:, i], rtol=1e-9, atol=1e-9)

    def test_the_most_likely_video_goes_on_as_it_began(self, model):
        given = {} if model.num_classes is None else {"classes": torch.tensor([2])}
        video = videogpt.generate(model, 1, temperature=0, **given)
        for first in (video[:, :0], video[:, :1], video[:, :3], video, video.flatten(1)[:, :5]):
            assert torch.equal(videogpt.generate(model, first=first, temperature=0, **given), video)

    def test_draws_are_those_of_what_is_new(self, model):
        """As if the codes before had not been drawn."""
        given = {} if model.num_classes is None else {"classes": torch.tensor([2, 0])}
        first = torch.randint(7, (2, 9), generator=seeded())
        video = videogpt.generate(model, first=first, generator=seeded(3), **given)
        generator = seeded(3)
        with torch.no_grad():
            flat = torch.cat([first, first.new_zeros(2, 7)], 1)
            for i in range(9, 16):
                logits = model(flat.view(2, 4, 2, 2), **given).flatten(1, 3)[:, i]
                flat[:, i] = mebt.sample_tokens(logits, generator=generator)[0]
        assert torch.equal(video.flatten(1), flat)

    def test_shorter_videos(self):
        model, first = tiny_videogpt(), torch.randint(7, (3, 1, 2, 2), generator=seeded())
        video = videogpt.generate(model, (3, 2, 2, 2), first=first)
        assert video.shape == (3, 2, 2, 2) and torch.equal(video[:, :1], first)
        assert torch.equal(videogpt.generate(model, (3, 1, 2, 2), first=first), first)

    @pytest.mark.parametrize(
        ("first", "shape", "error", "got"),
        [
            (torch.zeros(2, 4, 2, 2), None, TypeError, "int64 tensor, got first.dtype=torch.float32"),
            ([1, 2], None, TypeError, "int64 tensor, got first=list"),
            (torch.zeros(2, 17, dtype=torch.int64), None, ValueError, r"codes of a video, got first.shape=\(2, 17\)"),
            (torch.zeros(2, 5, 2, 2, dtype=torch.int64), None, ValueError, r"got first.shape=\(2, 5, 2, 2\)"),
            (torch.zeros(2, 2, 2, 2, dtype=torch.int64), (2, 1, 2, 2), ValueError, r"the 4 codes of a video"),
            (torch.zeros(2, 1, 2, 3, dtype=torch.int64), None, ValueError, r"got first.shape=\(2, 1, 2, 3\)"),
            (torch.zeros(2, 3, dtype=torch.int64), 1, ValueError, r"first must have shape \(1, t, 2, 2\) or \(1, n\)"),
        ],
        ids=["dtype", "type", "codes", "frames", "a shorter video", "another grid", "batch"],
    )
    def test_bad_input(self, first, shape, error, got):
        with pytest.raises(error, match=f"^generate: first must .*{got.removeprefix('first must ')}"):
            videogpt.generate(tiny_videogpt(), shape, first=first)

    def test_prefill_comes_first(self):
        model, codes = tiny_videogpt(), torch.zeros(1, 3, dtype=torch.int64)
        state = model.begin(1)
        model.prefill(codes, state)
        with pytest.raises(
            ValueError, match=r"^AttentionStack.prefill: tokens must be the first .* 3 of them behind 3$"
        ):
            model.prefill(codes, state)
        with pytest.raises(ValueError, match=r"^AttentionStack.prefill: tokens must be .* at most 16, got 17 of them"):
            model.prefill(codes[:, :1].expand(1, 17), model.begin(1))
