"""The tokenizers: their codebook, their shapes, their training; their numbers are checked in tests/golden."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vattn.models.vqvae import VQGAN, Codebook, level_strides

SMALL: dict[str, Any] = {"num_codes": 12, "code_dim": 4, "hidden": 4, "downsample": (2, 4, 4), "groups": 2}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def small_tokenizer(**settings: Any) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(**(SMALL | settings))


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
        # A checkpoint does not begin again.
        resumed = Codebook(10, 3, restart=None)
        resumed.load_state_dict(codebook.state_dict())
        far = z + 1000
        resumed(far, generator=seed())
        assert (resumed.embeddings.mean(1) < 1000).any()

    def test_codes_settle_at_the_means_of_their_vectors(self) -> None:
        centers = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
        codebook, generator = Codebook(3, 2), seed(1)
        codebook.embeddings.copy_(centers + 0.5)
        codebook.z_avg.copy_(codebook.embeddings)
        codebook.N.fill_(1.0)
        for _ in range(600):
            noise = 0.1 * torch.randn(30, 2, generator=generator)
            codebook((centers.repeat(10, 1) + noise).T[None], generator=generator)
        torch.testing.assert_close(codebook.embeddings, centers, atol=0.05, rtol=0.0)

    def test_unused_codes_restart_at_a_vector(self) -> None:
        for restart, comes_back in ((1.0, True), (None, False)):
            codebook = Codebook(4, 2, restart=restart)
            codebook.embeddings[3] = 1e3
            codebook.z_avg.copy_(codebook.embeddings)
            codebook.N.fill_(1.0)
            z = torch.randn(1, 2, 50)
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
        assert low.embeddings.dtype == torch.float32 and torch.equal(low.codes, codebook(z.bfloat16().float()).codes)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"^Codebook: z must have shape \(B, 3, ...\), got z.shape=\(2, 4, 5\)$"):
            Codebook(10, 3)(torch.zeros(2, 4, 5))
        with pytest.raises(ValueError, match=r"^Codebook: num_codes must be at least 1, got num_codes=0$"):
            Codebook(0, 3)


def train_codebook(rank: int, folder: str) -> None:
    """One of two processes, each with a half of the vectors."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    codebook, generator = Codebook(6, 2), seed(rank)
    for step in range(3):
        z = torch.randn(2, 2, 10, generator=seed(step))
        codebook(z[rank : rank + 1], generator=generator)
    torch.save(codebook.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_a_codebook(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_codebook, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # After one step per process, all 20 vectors have been counted.
    assert first["N"].sum().item() == pytest.approx(6 * 0.99**3 + 0.01 * 20 * (1 + 0.99 + 0.99**2), rel=1e-5)


class TestVQGAN:
    """The tokenizer of MeBT."""

    @pytest.mark.parametrize("downsample", [(2, 2, 2), (1, 2, 4), (2, 4, 2), (4, 1, 1)])
    def test_shapes(self, downsample: tuple[int, ...]) -> None:
        tokenizer, video = small_tokenizer(downsample=downsample).eval(), torch.randn(2, 3, 4, 8, 8)
        codes = tokenizer.encode(video)
        assert codes.shape == (2, *(size // factor for size, factor in zip((4, 8, 8), downsample, strict=True)))
        recon, quantized = tokenizer(video)
        assert recon.shape == video.shape and torch.equal(quantized.codes, codes)
        torch.testing.assert_close(tokenizer.decode(codes), recon)

    def test_strides(self) -> None:
        assert level_strides((4, 8, 8)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
        assert level_strides((1, 1, 1)) == []

    def test_training_lowers_the_loss(self) -> None:
        tokenizer, generator = small_tokenizer(hidden=8), seed()
        video: Tensor = F.interpolate(torch.randn(2, 3, 2, 4, 4, generator=generator), (4, 16, 16), mode="trilinear")
        optimizer, losses = torch.optim.AdamW(tokenizer.parameters(), 1e-3), []
        for _ in range(40):
            recon, quantized = tokenizer(video)
            loss = F.l1_loss(recon, video) + quantized.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(F.l1_loss(recon, video).item())
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("wrap", ["plain", "checkpoint", "in a MeBT"])
    def test_official_state_dicts(self, wrap: str) -> None:
        tokenizer, video = small_tokenizer(), torch.randn(1, 3, 4, 16, 16)
        tokenizer(video)  # the codebook begins
        tokenizer.eval()
        weights: dict[str, Any] = tokenizer.state_dict()
        if wrap == "checkpoint":
            weights = {"state_dict": weights | {"image_discriminator.model0.0.weight": torch.zeros(1)}}
        if wrap == "in a MeBT":
            weights = {f"first_stage_model.{name}": weight for name, weight in weights.items()}
            weights = {"state_dict": weights | {"pos_emb": torch.zeros(1)}}
        loaded = VQGAN.from_official(weights, (2, 4, 4), groups=2)
        assert not loaded.training
        assert torch.equal(loaded(video)[0], tokenizer(video)[0])
        assert torch.equal(loaded.codebook.N, tokenizer.codebook.N)

    def test_errors(self) -> None:
        for settings, message in (
            (
                {"downsample": (2, 3, 4)},
                r"level_strides: downsample must be three powers of 2, got downsample=\(2, 3, 4\)",
            ),
            ({"downsample": (1, 1, 1)}, "VQGAN: downsample must have a number above 1"),
            ({"hidden": 5, "groups": 4}, "VQGAN: 2 \\* hidden must be a multiple of groups=4, got hidden=5"),
            ({"num_codes": 0}, "VQGAN: num_codes must be at least 1, got num_codes=0"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                small_tokenizer(**settings)
        for shape in ((1, 3, 4, 10, 16), (3, 4, 16, 16), (16,)):
            with pytest.raises(
                ValueError, match=r"^VQGAN: video must have shape \(B, C, T, H, W\), .* got video.shape="
            ):
                small_tokenizer()(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"downsample must have 2 levels, got downsample=\(2, 2, 2\)$"):
            VQGAN.from_official(small_tokenizer().state_dict(), (2, 2, 2))
