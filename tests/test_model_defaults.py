"""PyTorch's defaults: no random number of a model, and none of its tables, depends on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests import svitt_models as svitt
from tests.model_zoo import MODELS
from vattn import BlockLayout
from vattn.models import mebt, video_dit, videogpt
from vattn.models.draws import Draws

DTYPES = [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float64, id="float64")]


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def all_draws(draws: Draws) -> list[Tensor]:
    cpu = torch.device("cpu")
    return [
        draws.exponential(1000, device=cpu),
        draws.normal(1000, device=cpu),
        draws.uniforms(1000, device=cpu),
        draws.permutation(2, 1000, cpu),
        torch.tensor([draws.uniform() for _ in range(100)], dtype=torch.float64, device="cpu"),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_follow_no_default_dtype(dtype: torch.dtype) -> None:
    expected = all_draws(Draws(seed()))
    with default_dtype(dtype):
        found = all_draws(Draws(seed()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert len(found[2].unique()) > 990


def test_draws_follow_no_default_device() -> None:
    expected = all_draws(Draws(seed()))
    with default_device("meta"):
        assert all(map(torch.equal, all_draws(Draws(seed())), expected))


def test_a_generator_draws_nothing_in_a_second_run() -> None:
    """What activation checkpointing runs again would draw other numbers; with PyTorch's own it draws the same."""

    def scaled(x: Tensor, generator: torch.Generator | None) -> Tensor:
        return (x * Draws(generator).uniforms(3, device=x.device)).square().sum()

    x = torch.ones(3, requires_grad=True)
    torch.manual_seed(0)
    numbers = torch.rand(3)
    torch.manual_seed(0)
    checkpoint(scaled, x, None, use_reentrant=False).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * numbers.square())
    loss = checkpoint(scaled, x, seed(), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^Draws: generator must be None inside of a backward pass, where"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_follow_no_default_dtype(dtype: torch.dtype) -> None:
    expected = BlockLayout.local_random(600, 2, num_random=20, generator=seed())
    with default_dtype(dtype):
        found = BlockLayout.local_random(600, 2, num_random=20, generator=seed())
    assert torch.equal(found.columns, expected.columns)


def tokenizer_loss(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    video = torch.rand(2, 3, 4, 16, 16, generator=generator, dtype=torch.float32, device="cpu") - 0.5
    return model.training_loss(video, generator), *model.codebook.buffers()


def mebt_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    found = torch.randint(7, (2, 3, 2, 2), generator=generator, device="cpu")
    model.train()
    losses = [model.training_loss(found, prior=p, step=9, generator=generator) for p in ("longest", "gaussian2")]
    model.eval()
    return (*losses, mebt.generate(model, 2, generator=generator), mebt.continue_video(model, found[:, :1], 3))


def videogpt_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    conditions: dict[str, Any] = {
        "classes": torch.tensor([2, 0], device="cpu"),
        "frames": torch.rand(2, 3, 1, 8, 8, generator=generator, dtype=torch.float32, device="cpu"),
    }
    found = videogpt.generate(model, 2, generator=generator, **conditions)
    return found, model.train().training_loss(found, **conditions)


def dit_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    text = torch.rand(2, 4, 5, generator=generator, dtype=torch.float32, device="cpu")
    conditions: dict[str, Any] = {"classes": torch.tensor([2, 0], device="cpu"), "text": text}
    found = video_dit.generate(model, 2, num_steps=3, guidance_scale=2.0, generator=generator, **conditions)
    loss = model.train().training_loss(found / found.std(), per_frame=True, generator=generator, **conditions)
    return found, loss


def svitt_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """With drawn layouts, negatives, masked words, and dropped residuals."""
    for block in model.video.blocks:
        block.drop_path = 0.5
    video = torch.rand(svitt.random_video(3).shape, generator=generator, dtype=torch.float32, device="cpu")
    words = torch.randint(3, 28, svitt.random_words(3).shape, generator=generator, device="cpu")
    torch.manual_seed(3)
    return tuple(model.train()(video, words, generator=generator))


def laps_runs(model: Any, generator: torch.Generator, sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    video = torch.rand(2, 4, 3, *sizes, generator=generator, dtype=torch.float32, device="cpu")
    return model(video), model.train().training_loss(video, torch.tensor([2, 0], device="cpu"))


def encoder_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    video = torch.rand(svitt.random_video().shape, generator=generator, dtype=torch.float32, device="cpu")
    seen = model(video, generator=generator)
    return seen.tokens, seen.pooled, *seen.kept


def answers_runs(model: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    video = torch.rand(svitt.random_video(3).shape, generator=generator, dtype=torch.float32, device="cpu")
    words = torch.randint(3, 28, svitt.random_words(3).shape, generator=generator, device="cpu")
    answers = torch.tensor([[1, 5, 2, 0], [1, 5, 7, 2], [1, 9, 2, 0]], device="cpu")
    return model.rank(video, words, None, answers, None, generator=generator)


RUNS: dict[str, Callable[[Any, torch.Generator], tuple[Tensor, ...]]] = {
    "VQVAE": tokenizer_loss, "VQGAN": tokenizer_loss, "MeBT": mebt_runs, "VideoGPT": videogpt_runs, "SViTT": svitt_runs,
    "LapsViT": partial(laps_runs, sizes=(8, 12)), "LapsVisformer": partial(laps_runs, sizes=(32, 32)),
    "VideoDiT": dit_runs, "VideoEncoder": encoder_runs, "VideoAnswers": answers_runs,
}  # fmt: skip


def run(name: str, model: Any) -> list[Tensor]:
    """What a model gives in evaluation, and in training and sampling, of float32 inputs and weights."""
    torch.manual_seed(0)
    model.train(name in ("VQVAE", "VQGAN"))
    return [*RUNS[name](model, seed(1))]


@pytest.mark.parametrize("name", RUNS)
def test_models_follow_no_default(name: str) -> None:
    expected = run(name, MODELS[name].make())
    for dtype in (torch.bfloat16, torch.float64):
        model = MODELS[name].make()
        with default_dtype(dtype):
            found = run(name, model)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), dtype


@pytest.mark.parametrize("name", ["VQVAE", "VQGAN", "MeBT", "VideoDiT"])
def test_models_follow_no_default_device(name: str) -> None:
    expected, model = run(name, MODELS[name].make()), MODELS[name].make()
    with default_device("meta"):
        found = run(name, model)
    assert all(map(torch.equal, found, expected))
