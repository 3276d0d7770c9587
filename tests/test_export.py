"""``torch.export`` of every model, strict and not, with a batch of any size: what is saved and loaded is the model."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import vattn
from tests import svitt_models as svitt
from tests.model_zoo import MODELS
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


class Program(nn.Module):
    """What of a model is exported, as a function of tensors that all begin with the batch."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


class Export(NamedTuple):
    inputs: Callable[[int], tuple[Tensor, ...]]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    model: str = ""


def _video(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def _words(batch: int) -> Tensor:
    return torch.randint(2, 29, (batch, 6))


def _places(batch: int) -> Tensor:
    return torch.arange(12).repeat(batch, 1)


def _answer(model: Any, video: Tensor, question: Tensor) -> Tensor:
    return model.states(video, question, None)


def _match(model: Any, video: Tensor, words: Tensor) -> Any:
    seen, text = model.encode_video(video), model.text(words)
    return model.similarity(seen.pooled, text[:, 0]), model.match(seen.tokens, text)


EXPORTS: dict[str, Export] = {
    "LapsViT": Export(_video(4, 3, 8, 12)),
    "LapsVisformer": Export(_video(4, 3, 32, 32)),
    "VideoEncoder": Export(_video(4, 3, 8, 12)),
    "TextEncoder": Export(lambda batch: (_words(batch), torch.ones(batch, 6, dtype=torch.int64))),
    "fusion": Export(
        lambda batch: (_words(batch), torch.randn(batch, 9, 16)),
        lambda model, words, video: model.fuse(model(words), None, video),
        "TextEncoder",
    ),
    "SViTT": Export(lambda batch: (torch.randn(batch, 4, 3, 8, 12), _words(batch)), _match),
    "VideoAnswers": Export(lambda batch: (torch.randn(batch, 4, 3, 8, 12), _words(batch)), _answer),
    "VQVAE": Export(_video(3, 4, 16, 16)),
    "VQGAN": Export(_video(3, 4, 16, 16)),
    "encoding": Export(_video(3, 4, 16, 16), lambda model, video: model.encode(video), "VQGAN"),
    "MeBT": Export(
        lambda batch: (torch.randint(7, (batch, 3, 2, 2)), _places(batch)[:, :5], _places(batch)[:, 5:]),
    ),
    "VideoGPT": Export(
        lambda batch: (torch.randint(7, (batch, 2, 4, 4)), torch.randint(3, (batch,)), torch.randn(batch, 3, 1, 8, 8)),
        lambda model, codes, classes, frames: model(codes, classes=classes, frames=frames),
    ),
    "ResNet3d": Export(_video(3, 2, 8, 8)),
}


def test_every_model_is_exported():
    assert {export.model or name for name, export in EXPORTS.items()} == set(MODELS)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", EXPORTS)
def test_exported_programs_are_the_model(name, strict):
    """For another batch than that of the example, and after a way through a file."""
    torch.manual_seed(0)
    export = EXPORTS[name]
    program = Program(MODELS[export.model or name].make(), export.call).eval()
    example = export.inputs(2)
    batch = Dim("batch", min=1, max=64)
    shapes = (tuple({0: batch} for _ in example),)
    exported = torch.export.export(program, example, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5, 13):
        inputs = export.inputs(size)
        found = []
        for run in (program, loaded):
            torch.manual_seed(1)  # which decides what is drawn
            found.append(tree_leaves(run(*inputs)))
        assert len(found[0]) == len(found[1]) > 0
        for x, y in zip(*found, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_any_number_of_frames(strict):
    """Of an operator, whose tokens are as dynamic as its batch."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return vattn.leap_attention(x, x, x, 2, fold_div=2)

    frames = Dim("frames", min=2, max=64)
    exported = torch.export.export(
        Attention(), (torch.randn(2, 2, 5, 3, 8),), dynamic_shapes=({0: Dim("batch"), 2: frames},), strict=strict
    )
    for shape in ((3, 2, 7, 3, 8), (5, 2, 2, 3, 8)):
        x = torch.randn(shape)
        assert torch.equal(exported.module()(x), Attention()(x))


def test_words_that_are_hidden():
    """A mask is an input as well, of which the values are not those of the example."""
    model = svitt.text_encoder()
    words, mask = _words(3), torch.ones(3, 6, dtype=torch.int64)
    exported = torch.export.export(model, (words, mask), dynamic_shapes=({0: Dim("batch")},) * 2)
    mask[1, 3:] = 0
    torch.testing.assert_close(exported.module()(words, mask), model(words, mask))
