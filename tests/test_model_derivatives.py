"""Derivatives through modules and models: both modes against each other, and what the documents train."""

import pathlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils._pytree import tree_leaves

import vattn
from tests import svitt_models
from tests.model_zoo import MODELS
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one_number(results: Any) -> Tensor:
    """Of all that a model gives and that has a derivative."""
    given = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.stack([x.double().sin().mean() for x in given]).sum()


def answering_loss(model: Any, generator: torch.Generator) -> Tensor:
    """What it gives otherwise is a ranking, without a derivative."""
    words, answers = svitt_models.random_words(), torch.tensor([[1, 5, 2, 0], [1, 9, 2, 0]])
    of, weights = torch.tensor([0, 1]), torch.tensor([1.0, 0.5])
    return model(svitt_models.random_video(), words, None, answers, None, of, weights, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_both_modes_agree_through_every_model(name):
    """<gradient, tangent> is what forward mode finds along the tangent, for all parameters at once."""
    entry = MODELS[name]
    model = entry.make()
    if name == "SViTT":
        model.temperature.data.fill_(0.3)  # what is drawn is near 0: rounding is then multiplied by hundreds
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) * p.abs() for name, p in parameters.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            generator = torch.Generator().manual_seed(5)
            return one_number(
                answering_loss(model, generator) if name == "VideoAnswers" else entry.run(model, generator)
            )

    gradients = grad(run)(parameters)
    along = torch.stack([(gradients[name] * tangents[name]).sum() for name in parameters]).sum().double()
    _, forward, *_ = jvp(run, (parameters,), (tangents,))
    assert along != 0
    torch.testing.assert_close(forward, along, rtol=1e-3, atol=1e-5)


def test_modules_with_a_bias_of_their_own():
    """It goes through PyTorch's attention, whose fused kernels have no forward mode."""
    module = vattn.nn.LatentAttention(8, 2)
    x, y, bias = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 1, 5, 12)
    inputs = (x, y, bias)
    tangents = tuple(torch.randn_like(z) for z in inputs)

    def read(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        return module([x], [x, y], bias)[0]

    out, along, *_ = jvp(read, inputs, tangents)
    module.double()
    exact, exact_along, *_ = jvp(read, tuple(z.double() for z in inputs), tuple(z.double() for z in tangents))
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(along.double(), exact_along, rtol=1e-4, atol=1e-5)


def test_meanflow_of_the_documents():
    """The loss and the gradients of every parameter, in float32 by the kernels and in float64 by the reference."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "derivatives.md"
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0], names)
    model = names["LeapFlow"](channels=3, num_frames=4)
    x, e = torch.randn(2, 2, 4, 9, 3)
    r, t = torch.rand(2, 2).sort(0).values
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        losses.append(names["meanflow_loss"](model, *(y.to(dtype) for y in (x, e, r, t))))
        grads.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-6)
    for actual, truth in zip(*grads, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-3, atol=1e-5)
