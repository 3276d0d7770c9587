"""Tokens from logits that are not finite or nearly so, and videos of grids that a model does not know."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model_zoo import MODELS
from vattn.models import mebt, videogpt
from vattn.models.mebt import masked_loss, sample_tokens

LOGITS = torch.tensor([[0.1, 2.0, 1.0], [3.0, -1.0, 2.9]])
INVALID = [
    pytest.param(lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)), id="one NaN"),
    pytest.param(lambda x: torch.full_like(x, torch.nan), id="NaN"),
    pytest.param(lambda x: torch.cat([x[:1], torch.full_like(x[1:], -torch.inf)]), id="-infinity in one row"),
    pytest.param(lambda x: x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf)), id="infinity"),
]


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class TestLogits:
    """What no token can be drawn from raises."""

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
    @pytest.mark.parametrize("spoil", INVALID)
    def test_not_finite(self, spoil: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^sample_tokens: logits must have a finite maximum in each row, got"):
            sample_tokens(spoil(LOGITS), **settings)

    def test_tokens_that_are_forbidden(self) -> None:
        logits = LOGITS.masked_fill(torch.tensor([False, True, False]), -torch.inf)
        tokens, probabilities = sample_tokens(logits.expand(500, 2, 3), generator=seed())
        assert not (tokens == 1).any() and (probabilities[..., 1] == 0).all()

    @pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
    @pytest.mark.parametrize("factor", [1.0, 1e30])
    def test_temperatures_next_to_nothing(self, temperature: float, factor: float) -> None:
        tokens, probabilities = sample_tokens(LOGITS * factor, temperature=temperature)
        assert tokens.tolist() == [1, 0] and probabilities.tolist() == [[0, 1, 0], [1, 0, 0]]

    @pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
    def test_temperatures_that_are_none(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=r"^sample_tokens: temperature must be at least 0, got temperature="):
            sample_tokens(LOGITS, temperature=temperature)

    def test_nothing(self) -> None:
        tokens, probabilities = sample_tokens(torch.zeros(0, 5))
        assert tokens.shape == (0,) and probabilities.shape == (0, 5)
        with pytest.raises(ValueError, match=r"^sample_tokens: logits must have shape \(..., V\), V at least 1"):
            sample_tokens(torch.zeros(2, 0))


SAMPLERS: dict[str, Callable[..., Any]] = {
    "maskgit": partial(mebt.generate, shape=2, num_steps=3),
    "draft_and_revise": partial(mebt.generate, shape=2, sampler=mebt.draft_and_revise),
    "VideoGPT": partial(videogpt.generate, shape=2, classes=torch.tensor([0, 1]), frames=torch.zeros(2, 3, 1, 8, 8)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_whose_weights_are_lost(name: str) -> None:
    model = MODELS["VideoGPT" if name == "VideoGPT" else "MeBT"].make()
    SAMPLERS[name](model, generator=seed())
    with torch.no_grad():
        next(x for n, x in model.named_parameters() if n.endswith(("fc_out.weight", "head.weight"))).fill_(torch.nan)
    with pytest.raises(ValueError, match=r": logits must have a finite maximum in each row, got"):
        SAMPLERS[name](model, generator=seed())


class TestGrids:
    """A position is a number in the raster of the model's grid."""

    @pytest.mark.parametrize(
        "shape", [(1, 3, 1, 2), (1, 3, 2, 1), (1, 2, 4, 4), (1, 4, 2, 2), (1, 13), (1, 3, 2, 2, 1)]
    )
    def test_others_are_refused(self, shape: tuple[int, ...]) -> None:
        model, codes = MODELS["MeBT"].make(), torch.zeros(shape, dtype=torch.int64)
        calls: list[Callable[[], Any]] = [
            lambda: mebt.generate(model, shape),
            lambda: mebt.inpaint(model, codes, torch.ones_like(codes, dtype=torch.bool)),
            lambda: mebt.maskgit(model, codes),
            lambda: mebt.draft(model, codes),
            lambda: mebt.revise(model, codes),
            lambda: mebt.draft_and_revise(model, codes),
            lambda: mebt.continue_video(model, codes[:, :1], shape[1]),
            lambda: model(codes, torch.tensor([[0]]), torch.tensor([[1]])),
        ]
        for call in calls:
            with pytest.raises(
                ValueError, match=r": codes must (have shape \(B, T, 2, 2\), T at most 3|be at most 12 in a video)"
            ):
                call()

    def test_fewer_frames_are_the_first(self) -> None:
        """Positions are the same: what a shorter video says is what a longer one with the same contexts says."""
        model, codes = MODELS["MeBT"].make(), torch.randint(7, (2, 3, 2, 2), generator=seed())
        context, target = (torch.arange(*ends).expand(2, -1) for ends in ((0, 5), (5, 8)))
        expected = model(codes, context, target)
        assert torch.equal(model(codes[:, :2], context, target), expected)
        assert torch.equal(model(codes[:, :2].flatten(1), context, target), expected)
        assert mebt.generate(model, (2, 2, 2, 2), num_steps=2, generator=seed()).shape == (2, 2, 2, 2)


def test_loss_of_a_model_in_float64() -> None:
    """Its ratio of masked tokens is not rounded to float32: 7 of 9 are."""
    logits = torch.randn(2, 7, 5, dtype=torch.float64, generator=seed())
    codes = torch.randint(5, (2, 7), generator=seed())
    whole = -logits.log_softmax(-1).gather(-1, codes[..., None]).sum()
    for average in (0.0, 0.5, 1.0):
        loss = masked_loss(logits, codes, 7, 9, average=average)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, whole / (2 * 9 * (7 / 9) ** average), rtol=1e-15, atol=0.0)
