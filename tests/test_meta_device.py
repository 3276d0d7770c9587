"""Models that are made without memory, and programs whose default device is another one: nothing that is computed is
left behind, and nothing is put where nobody asked for it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.calls import DIFFERENTIABLE, OPERATORS, as_tuple, calls
from tests.model_zoo import MODELS, assert_same
from tests.programs import PROGRAMS, make
from vattn import _library
from vattn.models import mebt, videogpt, vqvae
from vattn.models.tables import Table

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


@contextlib.contextmanager
def default_device(device: str) -> Any:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def poison(model: nn.Module) -> None:
    """Memory as it may be found: every weight and every buffer, also those that no checkpoint has."""
    for x in (*model.parameters(), *model.buffers()):
        x.data.fill_(torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else 10**6)


@pytest.mark.parametrize("name", MODELS)
def test_made_on_meta(name):
    """Memory and weights come later: the model is the one that they are of, bit by bit."""
    entry = MODELS[name]
    model = entry.make()
    with torch.device("meta"):
        other = entry.kind(**entry.settings)
    assert all(x.is_meta for x in (*other.parameters(), *other.buffers()))
    other.to_empty(device="cpu")
    poison(other)
    other.load_state_dict(model.state_dict(), strict=True)
    expected, found = (_outputs(entry, x) for x in (model, other.eval()))
    assert_same(found, expected)


def _outputs(entry: Any, model: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(entry.outputs(model))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_forward_on_meta(name):
    """It says which shapes come out, and leaves nothing behind."""
    program, inputs = make(name), PROGRAMS[name].inputs(2)
    weights = {name: x.clone() for name, x in program.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        expected = tree_leaves(program(*inputs))
        on_meta = tree_leaves(program.to("meta")(*(x.to("meta") for x in inputs)))
        for x, y in zip(on_meta, expected, strict=True):
            assert x.is_meta and x.shape == y.shape and x.dtype == y.dtype
        program.to_empty(device="cpu")
        poison(program)
        program.load_state_dict(weights)
        torch.manual_seed(0)
        assert_same(tree_leaves(program(*inputs)), expected)


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_default_device(name):
    """Tensors are made where those are that they belong to."""
    program, inputs = make(name), PROGRAMS[name].inputs(2)
    found = []
    with torch.no_grad():
        for mode in (contextlib.nullcontext(), torch.device("meta"), default_device("meta")):
            torch.manual_seed(0)
            with mode:
                found.append(tree_leaves(program(*inputs)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_another_default_device_for_operators(op, dtype):
    function, tensors = calls(dtype)[op]
    expected, found = [], []
    for results, mode in ((expected, contextlib.nullcontext()), (found, default_device("meta"))):
        with mode:
            results += as_tuple(function(*tensors))
            if op in DIFFERENTIABLE:
                results += torch.autograd.grad(results[0].sum(), tensors, materialize_grads=True)
                plain = tuple(x.detach() for x in tensors)
                results += tree_leaves(torch.func.jvp(function, plain, plain))
    assert_same(tree_map(Tensor.detach, found), tree_map(Tensor.detach, expected))


def _seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _generate_codes(attention: str) -> Any:
    model = videogpt.VideoGPT(7, 4, (2, 4, 4), 12, 2, 2, attention=attention, block_size=4, num_local_blocks=1)
    for p in model.parameters():
        nn.init.normal_(p, generator=_seed())
    return lambda: videogpt.generate(model.eval(), 2, generator=_seed())


def _train(model: Any, *inputs: Tensor) -> Any:
    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model.training_loss(*inputs, generator=_seed())
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def _complete(model: Any) -> Any:
    return lambda: mebt.generate(model, 2, num_steps=3, generator=_seed())


def _rank(model: Any) -> Any:
    video, words = torch.randn(2, 4, 3, 8, 12), torch.full((2, 6), 3)
    return lambda: model.rank(video, words, None, words, None, generator=_seed())


def _quantize() -> Any:
    book, x = vqvae.Codebook(6, 4), torch.randn(2, 4, 2, 3, 3)

    def run() -> list[Tensor]:
        other = vqvae.Codebook(6, 4)
        other = other.to_empty(device="cpu") if other.embeddings.is_meta else other
        other.load_state_dict(book.state_dict())
        given = other(x, generator=_seed())
        return [*given, *other(x, generator=_seed()), *other.state_dict().values()]

    return run


ACTIONS: dict[str, Callable[[], Callable[[], Any]]] = {
    "VideoGPT generates": lambda: _generate_codes("full"),
    "sparse VideoGPT generates": lambda: _generate_codes("sparse"),
    "MeBT generates": lambda: _complete(MODELS["MeBT"].make()),
    "MeBT trains": lambda: _train(MODELS["MeBT"].make(), torch.randint(7, (2, 3, 2, 2))),
    "VideoDiT trains": lambda: _train(MODELS["VideoDiT"].make(), torch.randn(2, 2, 3, 4, 6)),
    "a codebook trains": _quantize,
    "answers are ranked": lambda: _rank(MODELS["VideoAnswers"].make()),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_another_default_device_while(name):
    torch.manual_seed(0)
    act = ACTIONS[name]()
    torch.manual_seed(1)
    expected = tree_leaves(act())
    torch.manual_seed(1)
    with default_device("meta"):
        found = tree_leaves(act())
    assert_same(found, expected)


def test_a_copy_of_a_table_is_of_no_mode():
    """One that is made in inference mode is there when a model learns."""
    table = Table(torch.arange(3))
    with torch.inference_mode():
        copy = table.on(torch.device("meta"))
    assert copy.is_meta and not copy.is_inference()
