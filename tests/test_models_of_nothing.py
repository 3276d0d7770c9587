"""Empty batches: every model gives empty results, and a loss of 0 whose gradients are 0."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import svitt_models as svitt
from tests.model_zoo import MODELS
from vattn.models import mebt, video_dit, videogpt


class Empty(NamedTuple):
    """What a model does with no videos: tensors whose first size must be 0, and a loss, if it has one."""

    results: Callable[[Any], tuple[Tensor, ...]]
    loss: Callable[[Any], Tensor] | None = None


def videos(*shape: int) -> Tensor:
    return torch.zeros(0, *shape)


def codes(*shape: int) -> Tensor:
    return torch.zeros(0, *shape, dtype=torch.int64)


def tokenize(model: Any) -> tuple[Tensor, ...]:
    reconstruction, quantized = model(videos(3, 4, 16, 16))
    return reconstruction, quantized.embeddings, quantized.codes, model.decode(quantized.codes)


def find(model: mebt.MeBT) -> tuple[Tensor, ...]:
    first = codes(1, 2, 2)
    return (
        model(codes(3, 2, 2), codes(2), codes(3)),
        mebt.generate(model, 0),
        mebt.generate(model, (0, 2, 2, 2), sampler=mebt.draft_and_revise),
        mebt.continue_video(model, first, 3),
        mebt.interpolate(model, first, first, 2),
        mebt.maskgit(model, codes(3, 2, 2)).codes,
    )


CONDITIONS: dict[str, Any] = {"classes": codes(), "frames": videos(3, 1, 8, 8)}
TOKENIZER = Empty(tokenize, lambda model: model.training_loss(videos(3, 4, 16, 16)))


def laps(height: int, width: int) -> Empty:
    video = videos(4, 3, height, width)
    return Empty(
        lambda model: (model(video), model.forward_frames(video)), lambda model: model.training_loss(video, codes())
    )


NOTHING: dict[str, Empty] = {
    "LapsViT": laps(8, 12),
    "LapsVisformer": laps(32, 32),
    "VideoEncoder": Empty(lambda model: tuple(model(svitt.random_video()[:0])[:2])),
    "TextEncoder": Empty(lambda model: (model(svitt.random_words()[:0]),)),
    "SViTT": Empty(
        lambda model: (model.encode_video(svitt.random_video()[:0]).tokens,),
        lambda model: model.training_loss(svitt.random_video()[:0], svitt.random_words()[:0]),
    ),
    "VideoAnswers": Empty(
        lambda model: model.rank(
            svitt.random_video()[:0], svitt.random_words()[:0], None, torch.tensor([[1, 5, 2], [1, 7, 2]]), None
        ),
        lambda model: model.training_loss(
            svitt.random_video()[:0], svitt.random_words()[:0], None, codes(3), None, codes(), torch.zeros(0)
        ),
    ),
    "VQVAE": TOKENIZER,
    "VQGAN": TOKENIZER,
    "MeBT": Empty(find, lambda model: model.training_loss(codes(3, 2, 2))),
    "VideoGPT": Empty(
        lambda model: (model(codes(2, 4, 4), **CONDITIONS), videogpt.generate(model, 0, **CONDITIONS)),
        lambda model: model.training_loss(codes(2, 4, 4), **CONDITIONS),
    ),
    "VideoDiT": Empty(
        lambda model: (
            model(videos(2, 3, 4, 6), 7, classes=codes(), text=videos(4, 5)),
            model.add_noise(videos(2, 3, 4, 6), videos(2, 3, 4, 6), 7),
            video_dit.generate(model, 0, num_steps=2, classes=codes(), guidance_scale=2.0),
        ),
        lambda model: model.training_loss(videos(2, 3, 4, 6), classes=codes(), text=videos(4, 5), per_frame=True),
    ),
    "ResNet3d": Empty(lambda model: (model(videos(3, 2, 8, 8)),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_results(name: str) -> None:
    for result in NOTHING[name].results(MODELS[name].make()):
        assert len(result) == 0


@pytest.mark.parametrize("name", [name for name in MODELS if NOTHING[name].loss is not None])
def test_losses(name: str) -> None:
    model = MODELS[name].make().train()
    before = copy.deepcopy(dict(model.named_buffers()))
    empty_loss = NOTHING[name].loss
    assert empty_loss is not None
    loss = empty_loss(model)
    assert loss.shape == () and loss == 0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(bool((gradient == 0).all()) for gradient in gradients)
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
