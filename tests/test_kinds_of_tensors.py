"""Every kind of tensor that PyTorch has, given to every operator: it works, or is refused by name before any kernel."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

import vattn
from tests.calls import OPERATORS, as_tuple, calls
from tests.layouts import layout_of
from vattn import _library

pytestmark = [
    pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built"),
    pytest.mark.filterwarnings("ignore:.*(prototype|beta state|quantized|Quantize).*"),
]
ALONE = [("periodic_shift", 0), ("nearest_code", 0)]  # beside which nothing must be distributed
TABLE = ("edge_sparse_attention", 3)  # which is a module's, and not given


class Subclass(Tensor):
    """With the __torch_function__ that every subclass inherits."""


class Silent(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A process group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _distributed(x: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, mesh, [Replicate()])


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"a dense tensor, got {}=nested tensor"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        r"a dense tensor, got {}=nested tensor",
    ),
    "coo": (lambda x: x.to_sparse(), r"a dense tensor, got {}.layout=torch.sparse_coo"),
    "csr": (lambda x: x.flatten(1).to_sparse_csr(), r"a dense tensor, got {}.layout=torch.sparse_csr"),
    "masked": (
        lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
        "a tensor without a mask, got {}=MaskedTensor",
    ),
    "mkldnn": (lambda x: x.to_mkldnn(), r"a dense tensor, got {}.layout=torch._mkldnn"),
}
OF_NO_DTYPE: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "int": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "numpy": lambda x: x.numpy(),
    "numpy number": lambda x: np.float32(1.0),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
    "number": lambda x: 1.0,
}
WORKS: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "silent subclass": lambda x: x.as_subclass(Silent),
    "parameter": torch.nn.Parameter,
    "buffer": torch.nn.Buffer,
    "wrapper": lambda x: TwoTensor(x, x.clone()),
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "shared": lambda x: x.clone().share_memory_(),
    "inference": lambda x: torch.inference_mode()(x.clone)(),
}


def numbers(x: Tensor) -> Tensor:
    """The same in a tensor of the plainest kind."""
    if isinstance(x, TwoTensor):
        return x.a
    return torch.zeros(x.shape) if x._is_zerotensor() else torch.tensor(x.tolist(), dtype=x.dtype)


def given(op: str) -> tuple[Any, list[Tensor], list[int]]:
    """An operator's function, its tensors, and the places of those that it is given."""
    torch.manual_seed(0)
    function, tensors = calls(torch.float32)[op]
    return function, [x.detach() for x in tensors], [i for i in range(len(tensors)) if (op, i) != TABLE]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("op", OPERATORS)
def test_refused_by_name(op, kind):
    make, must = REFUSED[kind]
    function, tensors, places = given(op)
    for i in places:
        x = tensors[i]
        if kind == "csr" and x.dim() < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = make(x)
        with pytest.raises(TypeError, match=rf"^{op}: \w+(\[\d\])? must be {must.format(NAME)}$"):
            function(*tensors[:i], wrong, *tensors[i + 1 :])


NAME = r"\w+(\[\d\])?"


@pytest.mark.parametrize("op", OPERATORS)
def test_distributed_tensors_among_others(op, mesh):
    """One alone is refused by name; all of them give what plain ones give."""
    function, tensors, places = given(op)
    for i in places:
        if (op, i) not in ALONE:
            with pytest.raises(TypeError, match=rf"^{op}: {NAME} must be a DTensor.*, got {NAME}=Tensor$"):
                function(*tensors[:i], _distributed(tensors[i], mesh), *tensors[i + 1 :])
    if op == "select_tokens":  # whose call has an importance of its own
        return
    found = function(*(_distributed(x, mesh) if i in places else x for i, x in enumerate(tensors)))
    for x, y in zip(as_tuple(found), as_tuple(function(*tensors)), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.full_tensor(), y)


@pytest.mark.parametrize("kind", OF_NO_DTYPE)
@pytest.mark.parametrize("op", OPERATORS)
def test_of_no_dtype_that_is_known(op, kind):
    function, tensors, places = given(op)
    for i in places:
        wrong = OF_NO_DTYPE[kind](tensors[i])
        with pytest.raises(TypeError, match=rf"^{op}: {NAME} must "):
            function(*tensors[:i], wrong, *tensors[i + 1 :])


@pytest.mark.parametrize("kind", WORKS)
@pytest.mark.parametrize("op", OPERATORS)
def test_works(op, kind):
    """Each of the inputs alone, and all of them."""
    function, tensors, places = given(op)
    for which in (*([i] for i in places), places):
        inputs = [WORKS[kind](x) if i in which else x for i, x in enumerate(tensors)]
        plain = [numbers(x) for x in inputs]
        for x, y in zip(as_tuple(function(*inputs)), as_tuple(function(*plain)), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            torch.testing.assert_close(numbers(x), numbers(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPERATORS)
def test_fake_tensors(op):
    """They say what would come out."""
    function, tensors, places = given(op)
    expected = as_tuple(function(*tensors))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) if i in places else x for i, x in enumerate(tensors)]
        for x, y in zip(as_tuple(function(*fakes)), expected, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            assert [x.stride(i) for i in range(x.dim()) if x.shape[i] > 1] == [
                y.stride(i) for i in range(y.dim()) if y.shape[i] > 1
            ]


@pytest.mark.parametrize("op", OPERATORS)
def test_of_a_functional_tensor(op):
    function, tensors, _ = given(op)
    expected = as_tuple(function(*tensors))

    def call(*x: Tensor) -> Any:
        return as_tuple(function(*x, *tensors[len(x) :]))

    found = torch.func.functionalize(call)(*tensors[:3])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


Q, KEYS = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 6, 4)
LAYOUT = layout_of([[0], [1]], num_tokens=5, block_size=3, num_global=1)
INDICES: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "kept": (lambda x: vattn.node_sparse_attention(Q, KEYS, KEYS, x), torch.tensor([[0, 1], [2, 5]])),
    "kept_lengths": (
        lambda x: vattn.node_sparse_attention(Q, KEYS, KEYS, torch.tensor([[0, 1], [2, 9]]), kept_lengths=x),
        torch.tensor([2, 1]),
    ),
    "key_lengths": (lambda x: vattn.latent_attention(Q, KEYS, KEYS, key_lengths=x), torch.tensor([2, 3])),
    "key_lengths of an importance": (lambda x: vattn.token_importance(Q, KEYS, key_lengths=x), torch.tensor([2, 3])),
    "positions": (
        lambda x: vattn.edge_sparse_attention(KEYS, KEYS, KEYS, LAYOUT, positions=x, causal=True),
        torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]),
    ),
    "positions of a selection": (
        lambda x: vattn.select_tokens(KEYS[:, 0], torch.rand(2, 5), 2, positions=x),
        torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]),
    ),
    "columns": (lambda x: vattn.BlockLayout(6, 3, torch.tensor([0, 1, 2]), x), torch.tensor([0, 1])),
}


@pytest.mark.parametrize("kind", ["coo", "nested", "jagged", "distributed", "float", "bool", "list", "numpy"])
@pytest.mark.parametrize("name", INDICES)
def test_what_counts_and_numbers(name, kind, mesh):
    call, index = INDICES[name]
    call(index)
    if kind in REFUSED:
        if kind in ("nested", "jagged") and index.dim() == 1:
            wrong = torch.nested.nested_tensor([index], layout=torch.jagged if kind == "jagged" else torch.strided)
        else:
            wrong = REFUSED[kind][0](index)
    elif kind == "distributed":
        wrong = _distributed(index, mesh)
    else:
        of_numbers = {"float": index.float, "bool": index.bool, "list": index.tolist, "numpy": index.numpy}
        wrong = of_numbers[kind]()
    must = f"{name.split()[0]} must "
    if kind == "distributed" and name != "columns":
        must = r"\w+ must be a DTensor where others are, got \w+=Tensor$"
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: {must}"):
        call(wrong)


def test_a_table_that_is_distributed(mesh):
    bias = vattn.RelativePositionBias3D((1, 1, 5), 2)
    bias.table = torch.nn.Parameter(_distributed(bias.table.detach(), mesh))
    for call in (
        lambda: vattn.edge_sparse_attention(KEYS, KEYS, KEYS, LAYOUT, position_bias=bias),
        lambda: vattn.token_importance(KEYS, KEYS, position_bias=bias),
    ):
        with pytest.raises(TypeError, match=r"^RelativePositionBias3D: table must be a local tensor"):
            call()


def test_on_several_devices():
    for op in OPERATORS:
        function, tensors, places = given(op)
        for i in places:
            if len(places) > 1:
                with pytest.raises(ValueError, match=rf"^{op}: {NAME} must be on the device of"):
                    function(*tensors[:i], tensors[i].to("meta"), *tensors[i + 1 :])


def test_a_dual_of_a_subclass():
    x = torch.randn(1, 2, 3, 2, 4).as_subclass(Subclass)
    out, along = torch.func.jvp(lambda x: vattn.leap_attention(x, x, x, 1), (x,), (x,))
    plain = tree_map_only(Tensor, lambda y: y.as_subclass(Tensor), x)
    expected = torch.func.jvp(lambda x: vattn.leap_attention(x, x, x, 1), (plain,), (plain,))
    assert torch.equal(out, expected[0]) and torch.equal(along, expected[1])
