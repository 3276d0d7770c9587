"""The tokenizers: their codebook, their shapes, their training; their numbers are checked in tests/golden."""

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vattn.models.vqvae import VQGAN, VQVAE, Codebook, level_strides

SMALL: dict[str, Any] = {"num_codes": 12, "code_dim": 4, "hidden": 4, "downsample": (2, 4, 4)}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def small_vqgan(**settings: Any) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(**(SMALL | {"groups": 2} | settings))


def small_vqvae(**settings: Any) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(**(SMALL | {"num_blocks": 1} | settings))


SMALL_TOKENIZERS = [pytest.param(small_vqgan, id="VQGAN"), pytest.param(small_vqvae, id="VQVAE")]


def codebook_at(codes: Tensor, **settings: Any) -> Codebook:
    """One in training, whose codes are where they are after one vector each."""
    codebook = Codebook(*codes.shape, **settings)
    for name, value in {"embeddings": codes, "z_avg": codes, "N": 1.0, "has_begun": True}.items():
        codebook.get_buffer(name).copy_(torch.as_tensor(value))
    return codebook


class TestCodebook:
    """Nearest codes, and codes that follow."""

    def test_nearest_code_and_gradient(self) -> None:
        codebook, z = Codebook(10, 3).eval(), torch.randn(2, 3, 4, 5, requires_grad=True)
        quantized = codebook(z)
        distances = torch.cdist(z.movedim(1, -1).flatten(0, 2), codebook.embeddings)
        assert torch.equal(quantized.codes.flatten(), distances.argmin(1))
        torch.testing.assert_close(quantized.embeddings, codebook.lookup(quantized.codes))
        torch.testing.assert_close(quantized.commitment_loss, 0.25 * distances.min(1).values.square().mean() / 3)
        (gradient,) = torch.autograd.grad(quantized.embeddings.sum(), z)
        assert torch.equal(gradient, torch.ones_like(z))  # straight through

    def test_perplexity_counts_codes_in_use(self) -> None:
        codebook = Codebook(10, 3).eval()
        for used in (1, 4, 10):
            z = codebook.embeddings[:used].T[None]
            assert codebook(z).perplexity.item() == pytest.approx(used, rel=1e-3)

    def test_evaluation_changes_nothing(self) -> None:
        codebook = Codebook(10, 3).eval()
        before = {name: buffer.clone() for name, buffer in codebook.named_buffers()}
        codebook(torch.randn(2, 3, 20))
        assert all(torch.equal(buffer, before[name]) for name, buffer in codebook.named_buffers())

    @pytest.mark.parametrize("num_vectors", [7, 40], ids=["fewer vectors than codes", "more"])
    def test_training_begins_at_the_vectors_once(self, num_vectors: int) -> None:
        codebook, z = Codebook(10, 3, restart=None), torch.randn(1, 3, num_vectors) + 100
        codebook(z, generator=seed())
        assert torch.cdist(codebook.z_avg / codebook.N[:, None], z[0].T).amin(1).max() < 3
        assert codebook.has_begun
        codebook(z + 1000, generator=seed())
        assert (codebook.embeddings.mean(1) < 1000).any()

    def test_a_checkpoint_restores_it_exactly(self) -> None:
        steps = [torch.randn(1, 3, 30, generator=seed(i)) for i in range(4)]
        whole, resumed, generator = Codebook(10, 3), Codebook(10, 3), seed()
        fresh = copy.deepcopy(whole.state_dict())
        for z in steps[:2]:
            whole(z, generator=generator)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        other_generator = seed()
        other_generator.set_state(generator.get_state())
        for z in steps[2:]:
            expected, actual = whole(z, generator=generator), resumed(z, generator=other_generator)
            assert all(map(torch.equal, expected, actual))
        # One that has not begun is restored, too.
        whole.load_state_dict(fresh)
        whole(steps[0] + 100, generator=seed())
        assert whole.embeddings.mean() > 50

    def test_codes_settle_at_the_means_of_their_vectors(self) -> None:
        centers = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
        codebook, generator = codebook_at(centers + 0.5), seed(1)
        for _ in range(600):
            noise = 0.1 * torch.randn(30, 2, generator=generator)
            codebook((centers.repeat(10, 1) + noise).T[None], generator=generator)
        torch.testing.assert_close(codebook.embeddings, centers, atol=0.05, rtol=0.0)

    def test_unused_codes_restart_at_a_vector(self) -> None:
        for restart, comes_back in ((1.0, True), (None, False)):
            codes = torch.randn(4, 2)
            codes[3] = 1e3
            codebook, z = codebook_at(codes, restart=restart), torch.randn(1, 2, 50)
            codebook(z, generator=seed())
            assert bool((codebook.embeddings[3] == z[0].T).all(1).any()) == comes_back

    def test_a_seed_reproduces_training(self) -> None:
        z, books = torch.randn(1, 3, 8), []
        for number in (0, 0, 1):
            codebook = Codebook(10, 3)
            codebook(z, generator=seed(number))
            books.append(codebook.embeddings.tolist())
        assert books[0] == books[1] != books[2]

    def test_autocast_finds_the_same_codes(self) -> None:
        codebook, z = Codebook(200, 3).eval(), torch.randn(1, 3, 500)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(codebook(z).codes, codebook.float()(z).codes)
            low = codebook(z.bfloat16())
        assert low.embeddings.dtype == torch.bfloat16
        assert torch.equal(low.codes, codebook(z.bfloat16().float()).codes)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"^Codebook: z must have shape \(B, 3, ...\), got z.shape=\(2, 4, 5\)$"):
            Codebook(10, 3)(torch.zeros(2, 4, 5))
        with pytest.raises(ValueError, match=r"^Codebook: num_codes must be at least 1, got num_codes=0$"):
            Codebook(0, 3)


def codebook_steps(samples: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What codebooks hold and say after steps in training, each with some of the same 3 samples of 10 vectors."""
    found = []
    for num_codes in (6, 50):  # fewer than vectors, and more
        codebook, generator = Codebook(num_codes, 2).double(), seed()
        for step in range(3):
            z = torch.randn(3, 2, 10, generator=seed(step), dtype=torch.float64)
            found.append(codebook(samples(z), generator=generator).perplexity)
        found += codebook.buffers()
    return found


def train_codebook(rank: int, folder: str) -> None:
    """One of two processes: the first has one sample of each step, the second two."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(codebook_steps(lambda z: z[:1] if rank == 0 else z[1:]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_a_codebook(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_codebook, (str(tmp_path),), nprocs=2)
    expected = codebook_steps(lambda z: z)
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestTokenizers:
    """The tokenizers of MeBT and VideoGPT."""

    @pytest.mark.parametrize("downsample", [(2, 2, 2), (1, 2, 4), (2, 4, 2), (4, 1, 1), (1, 1, 2)])
    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_shapes(self, small_tokenizer: Any, downsample: tuple[int, ...]) -> None:
        tokenizer, video = small_tokenizer(downsample=downsample).eval(), torch.randn(2, 3, 4, 8, 8)
        codes = tokenizer.encode(video)
        assert codes.shape == (2, *(size // factor for size, factor in zip((4, 8, 8), downsample, strict=True)))
        recon, quantized = tokenizer(video)
        assert recon.shape == video.shape and torch.equal(quantized.codes, codes)
        torch.testing.assert_close(tokenizer.decode(codes), recon)

    def test_strides(self) -> None:
        assert level_strides((4, 8, 8)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
        assert level_strides((1, 1, 1)) == []

    @pytest.mark.parametrize(
        "small_tokenizer, hidden, rate",
        [pytest.param(small_vqgan, 8, 1e-3, id="VQGAN"), pytest.param(small_vqvae, 16, 3e-3, id="VQVAE")],
    )
    def test_training_lowers_the_loss(self, small_tokenizer: Any, hidden: int, rate: float) -> None:
        tokenizer, generator = small_tokenizer(hidden=hidden), seed()
        video: Tensor = F.interpolate(torch.randn(2, 3, 2, 4, 4, generator=generator), (4, 16, 16), mode="trilinear")
        optimizer, losses = torch.optim.AdamW(tokenizer.parameters(), rate), []
        for _ in range(40):
            loss = tokenizer.training_loss(video, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]

    def test_losses(self) -> None:
        video = torch.rand(1, 3, 4, 16, 16) - 0.5
        for tokenizer, error in ((small_vqgan(), F.l1_loss), (small_vqvae(), lambda x, y: F.mse_loss(x, y) / 0.06)):
            recon, quantized = tokenizer.eval()(video)
            assert torch.equal(tokenizer.training_loss(video), error(recon, video) + quantized.commitment_loss)

    @pytest.mark.parametrize("wrap", ["plain", "checkpoint", "in a model"])
    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_official_state_dicts(self, small_tokenizer: Any, wrap: str) -> None:
        tokenizer, video = small_tokenizer(), torch.randn(1, 3, 4, 16, 16)
        tokenizer(video)  # the codebook begins
        tokenizer.eval()
        weights: dict[str, Any] = tokenizer.state_dict()
        del weights["codebook.has_begun"]
        if wrap == "checkpoint":
            weights = {"state_dict": weights | {"image_discriminator.model0.0.weight": torch.zeros(1)}}
        if wrap == "in a model":
            weights = {f"first_stage_model.{name}": weight for name, weight in weights.items()}
            weights = {"state_dict": weights | {"pos_emb": torch.zeros(1)}}
        settings = {"groups": 2} if isinstance(tokenizer, VQGAN) else {}
        loaded = type(tokenizer).from_official(weights, {"downsample": (2, 4, 4)}, **settings)
        assert not loaded.training and loaded.codebook.has_begun
        assert torch.equal(loaded(video)[0], tokenizer(video)[0])
        assert torch.equal(loaded.codebook.N, tokenizer.codebook.N)

    def test_official_settings(self) -> None:
        weights = small_vqgan().state_dict()
        config = {"downsample": (2, 4, 4), "padding_type": "circular", "restart_thres": 0.5, "n_codes": 12}
        loaded: Any = VQGAN.from_official(weights, config, groups=2)
        assert loaded.encoder.conv_first.padding_mode == "circular" and loaded.codebook.restart == 0.5
        assert VQGAN.from_official(weights, config | {"no_random_restart": True}, groups=2).codebook.restart is None
        assert VQGAN.from_official(weights, config, groups=2, restart=2.0).codebook.restart == 2.0
        with pytest.raises(TypeError, match=r"^VQGAN.from_official: config must be a mapping, got config=\(2, 4, 4\)$"):
            VQGAN.from_official(weights, (2, 4, 4))  # type: ignore[arg-type]

    def test_weights_without_the_state_of_training(self) -> None:
        tokenizer, video = small_vqvae(), torch.randn(1, 3, 4, 16, 16)
        state = ("codebook.N", "codebook.z_avg", "codebook.has_begun", "num_batches_tracked")
        weights = {name: x for name, x in tokenizer.state_dict().items() if not name.endswith(state)}
        loaded = VQVAE.from_official(weights, downsample=(2, 4, 4))
        assert torch.equal(loaded(video)[0], tokenizer.eval()(video)[0])
        codes = loaded.train()(video)[1].codes
        torch.testing.assert_close(loaded.codebook.N, 0.99 + 0.01 * codes.flatten().bincount(minlength=12))

    @pytest.mark.parametrize("steps", [0, 2], ids=["before the codebook begins", "after"])
    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_a_saved_tokenizer_trains_on_as_it_would_have(
        self, small_tokenizer: Any, steps: int, tmp_path: Path
    ) -> None:
        whole, videos, generators = small_tokenizer(), torch.rand(4, 2, 3, 4, 16, 16) - 0.5, [seed(), seed()]
        for video in videos[:steps]:
            whole.training_loss(video, generators[0])
        whole.save_pretrained(tmp_path)
        resumed = type(whole).from_pretrained(tmp_path).train()
        generators[1].set_state(generators[0].get_state())
        for video in videos[steps:]:
            losses = [model.training_loss(video, g) for model, g in zip((whole, resumed), generators, strict=True)]
            assert torch.equal(*losses)
        assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))

    def test_a_tokenizer_that_was_changed_is_not_saved(self, tmp_path: Path) -> None:
        tokenizer = small_vqvae()
        tokenizer.codebook.restart = None
        with pytest.raises(
            ValueError, match=r"^VQVAE.save_pretrained: codebook must be what config makes, .*restart=1.0"
        ):
            tokenizer.save_pretrained(tmp_path)

    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_errors(self, small_tokenizer: Any) -> None:
        name = type(small_tokenizer()).__name__
        cases: list[tuple[dict[str, Any], str]] = [
            (
                {"downsample": (2, 3, 4)},
                r"level_strides: downsample must be three powers of 2, got downsample=\(2, 3, 4\)",
            ),
            ({"downsample": (1, 1, 1)}, f"{name}: downsample must have a number above 1"),
            ({"num_codes": 0}, f"{name}: num_codes must be at least 1, got num_codes=0"),
        ]
        if name == "VQGAN":
            cases.append(
                ({"hidden": 5, "groups": 4}, r"VQGAN: 2 \* hidden must be a multiple of groups=4, got hidden=5")
            )
        else:
            cases.append(({"hidden": 5}, "VQVAE: hidden must be even, got hidden=5"))
        for settings, message in cases:
            with pytest.raises(ValueError, match=f"^{message}"):
                small_tokenizer(**settings)
        for shape in ((1, 3, 4, 10, 16), (3, 4, 16, 16), (16,)):
            with pytest.raises(
                ValueError, match=rf"^{name}: video must have shape \(B, C, T, H, W\), .* got video.shape="
            ):
                small_tokenizer()(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"downsample must have 2 levels, got downsample=\(2, 2, 2\)$"):
            type(small_tokenizer()).from_official(small_tokenizer().state_dict(), downsample=(2, 2, 2))

    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_what_is_no_video(self, small_tokenizer: Any) -> None:
        tokenizer, name = small_tokenizer(), type(small_tokenizer()).__name__
        for dtype in (torch.uint8, torch.int64, torch.bool):
            with pytest.raises(
                TypeError, match=rf"^{name}: video must be a floating-point tensor, of pixels from -0.5"
            ):
                tokenizer.encode(torch.zeros(1, 3, 4, 16, 16, dtype=dtype))
        order = r"got video.shape=\(1, 4, 3, 16, 16\); that is \(B, T, C, H, W\), of which video.transpose\(1, 2\)"
        with pytest.raises(ValueError, match=rf"^{name}: video must have shape \(B, C, T, H, W\), with C = 3.*{order}"):
            tokenizer.training_loss(torch.zeros(1, 4, 3, 16, 16))

    @pytest.mark.parametrize("small_tokenizer", SMALL_TOKENIZERS)
    def test_bytes_are_noticed_once(self, small_tokenizer: Any) -> None:
        tokenizer, video = small_tokenizer().eval(), torch.randint(256, (1, 3, 4, 16, 16), generator=seed()).float()
        with pytest.warns(UserWarning, match=r"video must have pixels from -0.5 to 0.5, got some of magnitude 255$"):
            tokenizer.encode(video)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer.encode(video)  # nothing waits for a GPU but the first one
            small_tokenizer().eval().encode(video / 255 - 0.5)
