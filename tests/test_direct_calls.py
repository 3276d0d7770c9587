"""Direct calls of ``torch.ops.vattn``, which bypass the public functions and their checks.

The arguments of valid calls are changed one at a time, as the kind of each allows. What comes of it is either an error
that names the operator, or results of the shapes that the fake kernel foretells for the same arguments; `make sanitize`
says that nothing out of bounds was read or written on the way.
"""

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vattn
from tests.calls import as_tuple
from tests.layouts import bias_without_table, layout_of
from vattn import _library, _operator
from vattn._attention import Attention
from vattn._signature import Signature
from vattn.ops.axial_attention import attend as attend_lines
from vattn.ops.edge_sparse_attention import attend as attend_blocks
from vattn.ops.latent_attention import attend as attend_latents
from vattn.ops.leap_attention import attend as attend_frames
from vattn.ops.node_sparse_attention import attend as attend_kept
from vattn.ops.select_tokens import _put_back

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")

SIZES = (-1, 0, 2**31, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), 7.0, -1.0)
INDICES = (-1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, -(2**63))
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
TOO_LARGE = {("select_tokens_backward", "num_tokens", 2**31)}  # it would be right, and take all memory


def bad_tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    """Other shapes, dtypes and devices, and other numbers if they are whole."""
    yield "nothing", None
    yield "meta", x.to("meta")
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield f"{dtype}", x.to(dtype)
    yield "first axis added", x[None]
    yield "last axis added", x[..., None]
    for axis, size in enumerate(x.shape):
        yield f"axis {axis} longer", torch.cat([x, x.narrow(axis, 0, min(size, 1))], axis) if size else x
        for length in {0, max(size - 1, 0)}:
            yield f"axis {axis} of {length}", x.narrow(axis, 0, length).clone()
        if size > 0:
            yield f"axis {axis} dropped", x.select(axis, 0).clone()
    if x.dtype in (torch.int32, torch.int64) and x.numel() > 0:
        for value in (*INDICES, int(x.max()) + 1, x.numel()):
            for at in (0, -1):
                fits = torch.iinfo(x.dtype).min <= value <= torch.iinfo(x.dtype).max
                changed = x.to(x.dtype if fits else torch.int64).flatten().clone()
                changed[at] = value
                yield f"{value} at {at}", changed.view(x.shape)


def bad_lists(tensors: list[Tensor]) -> Iterator[tuple[str, Any]]:
    yield "an empty list", []
    yield "a shorter list", tensors[:-1]
    yield "a longer list", [*tensors, tensors[0]]
    for i, x in enumerate(tensors):
        for name, bad in bad_tensors(x):
            yield f"[{i}] {name}", [*tensors[:i], bad, *tensors[i + 1 :]]


def bad_sizes(sizes: list[int]) -> Iterator[tuple[str, Any]]:
    yield "no sizes", []
    yield "one size more", [*sizes, 1]
    for i in range(len(sizes)):
        yield f"{i} missing", [*sizes[:i], *sizes[i + 1 :]]
        for value in SIZES:
            yield f"{value} at {i}", [*sizes[:i], value, *sizes[i + 1 :]]
    yield "a product of 2**62", [2**31, 2**31, 1]
    yield "a product of 2**64", [2**31, 2**31, 4]


BAD: dict[str, Callable[[Any], Iterator[tuple[str, Any]]]] = {
    "Tensor": bad_tensors,
    "Optional[Tensor]": lambda x: bad_tensors(x) if x is not None else iter([("a number", torch.zeros(1))]),
    "List[Tensor]": bad_lists,
    "int": lambda value: ((str(x), x) for x in SIZES),
    "List[int]": bad_sizes,
    "float": lambda value: ((str(x), x) for x in NUMBERS),
    "bool": lambda value: iter([("the other", not value)]),
}
"""By the kind of an argument, what a valid one is changed to."""

ANYTHING = {"causal", "importance", "transpose", "column_offsets", "rows"}
"""Of these nothing is bad: switches, and the transposed layout, which only a GPU reads."""


def with_everything() -> list[Callable[..., Any]]:
    """Calls with all that is optional, each of tensors that get gradients."""
    rows = functools.partial(torch.randn, requires_grad=True)
    order = torch.tensor([3, 0, -1, -1, 4, -1, 1, 2])
    layout = layout_of([[0, 2, 2], [], [3, 0], [1], [3], [1], [0, 2], []], 5, 2, 1, samples=2, order=order)
    bias = bias_without_table((1, 2, 3), num_heads=2)
    positions, table = torch.tensor([[5, 0, 2, 4, 1]] * 2), rows(18, 2)

    def edges(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        bias.table = table  # type: ignore[assignment]
        return vattn.edge_sparse_attention(
            query, key, value, layout, position_bias=bias, positions=positions, causal=True, dropout_p=0.3,
            return_lse=True, return_importance=True,
        )[:2]  # fmt: skip

    def latent(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return vattn.latent_attention(
            query, key, value, key_lengths=torch.tensor([3, 2]), dropout_p=0.3, return_lse=True
        )

    def importance(query: Tensor) -> Any:
        bias.table = table  # type: ignore[assignment]
        lengths = torch.tensor([3, 6])
        return vattn.token_importance(
            query, query, position_bias=bias, positions=positions, key_lengths=lengths, lse=torch.randn(2, 2, 6)
        )

    def leap(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return vattn.leap_attention(query, key, value, 1, dropout_p=0.3, return_lse=True)

    def axial(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return vattn.axial_attention(query, key, value, dim=1, dropout_p=0.3, return_lse=True)

    def nodes(query: Tensor, key: Tensor, value: Tensor) -> Any:
        kept, lengths = torch.tensor([[2, 0, 2], [3, 1, 0]]), torch.tensor([3, 2])
        return vattn.node_sparse_attention(
            query, key, value, kept, kept_lengths=lengths, dropout_p=0.3, return_lse=True
        )

    def numbered(query: Tensor, key: Tensor, value: Tensor) -> Any:
        heads, queries, keys = (torch.arange(5, 5 + n) for n in (4, 3, 4))
        seed = torch.cat([torch.tensor([7]), heads, queries, keys])
        return attend_latents(
            query, [key[:, :, :1], key[:, :, 1:]], [value[:, :, :1], value[:, :, 1:]], None, 0.3, seed, 1.0
        )

    def select(tokens: Tensor) -> Any:
        return vattn.select_tokens(tokens, torch.rand(2, 5), keep=2, positions=positions)[0]

    shapes: dict[Callable[..., Any], list[tuple[int, ...]]] = {
        edges: [(2, 2, 6, 3)] * 3, latent: [(2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)], importance: [(2, 2, 6, 3)],
        leap: [(1, 2, 3, 2, 4)] * 3, axial: [(1, 2, 3, 2, 4)] * 3, nodes: [(2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)],
        numbered: [(2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)], select: [(2, 6, 3)],
    }  # fmt: skip
    return [
        functools.partial(differentiate, f, [rows(*s) for s in of] + ([table] if f is edges else []))
        for f, of in shapes.items()
    ]


def differentiate(function: Callable[..., Any], tensors: list[Tensor]) -> None:
    """Call forward, backward and tangent, as far as there are any."""
    results = [x for x in as_tuple(function(*tensors)) if x.requires_grad]
    if results:
        torch.autograd.grad([x.sum() for x in results], tensors)
        primals = tuple(x.detach() for x in tensors)
        torch.func.jvp(function, primals, primals)


class Record(TorchDispatchMode):
    """What the kernels of ``vattn`` are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vattn":
            self.calls.setdefault(func.name().removeprefix("vattn::"), []).append(args)
        return func(*args, **(kwargs or {}))


@functools.cache
def valid_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Valid arguments of every op: those of the small calls in tests/operators, and with all that is optional."""
    torch.manual_seed(0)
    with Record() as record:
        for name in vattn.ops.OPERATORS:
            differentiate(*importlib.import_module(f"tests.operators.{name}").call(torch.float32))
        for call in with_everything():
            call()
    return record.calls


def ops() -> list[str]:
    """All of the library's ops, backward and tangent among them."""
    names = torch._C._dispatch_get_all_op_names()
    of_kernels = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return sorted(name.removeprefix("vattn::") for name in of_kernels if name.startswith("vattn::"))


def signatures() -> dict[str, Signature]:
    """What the launchers of every op hold a call to."""
    public = list(vattn.ops.OPERATORS.values())
    derived = [x for op in public if isinstance(op, Attention) for x in (op.backward_op, op.jvp_op)]
    return {op.name: op.signature for op in [*public, *derived, _put_back]}


def arguments(op: str) -> list[Any]:
    return getattr(torch.ops.vattn, op).default._schema.arguments


def kind(argument: Any) -> str:
    return str(argument.real_type)


def refusal(op: str, call: Callable[..., Any], *args: Any) -> Exception | None:
    """Why `call` raises, if it does: an error that names `op`."""
    try:
        call(*args)
    except (ValueError, TypeError, RuntimeError) as error:
        name = re.sub("_(backward|jvp)$", "", op)
        assert re.search(rf"\b{name}", str(error)), f"{type(error).__name__} does not name {op}: {error}"
        return error
    return None


def outcome(op: str, args: list[Any]) -> Exception | None:
    """Why the call raises, or nothing if its results have the shapes that the fake kernel foretells."""
    call = getattr(torch.ops.vattn, op)

    def run() -> None:
        results = call(*args)
        assert shapes(results) == shapes(call(*(on_meta(x) for x in args)))

    return refusal(op, run)


def on_meta(x: Any) -> Any:
    return [on_meta(y) for y in x] if isinstance(x, list) else x.to("meta") if isinstance(x, Tensor) else x


def shapes(results: Any) -> Any:
    if isinstance(results, Tensor):
        return tuple(results.shape)
    return [shapes(x) for x in results]


def test_every_kind_of_argument_has_bad_values():
    """And every op has valid calls, in which each of its arguments stands for something."""
    assert {kind(x) for op in ops() for x in arguments(op)} == set(BAD)
    assert set(valid_calls()) == set(ops())
    for op, calls in valid_calls().items():
        for args in calls:
            assert outcome(op, list(args)) is None
        for argument, *values in zip(arguments(op), *calls, strict=True):
            absent = all(value is None for value in values)
            assert not absent or argument.name in ANYTHING, f"{op}: {argument.name} is always None"


def changed_calls(op: str, name: str) -> Iterator[tuple[str, list[Any]]]:
    """Valid calls with bad values of the argument `name`, and what is bad."""
    i = next(i for i, x in enumerate(arguments(op)) if x.name == name)
    for args in valid_calls()[op]:
        for change, bad in BAD[kind(arguments(op)[i])](args[i]):
            if isinstance(bad, (Tensor, list)) or (op, name, bad) not in TOO_LARGE:
                yield change, [*args[:i], bad, *args[i + 1 :]]


EVERY_ARGUMENT = pytest.mark.parametrize(("op", "name"), [(op, x.name) for op in ops() for x in arguments(op)])


@EVERY_ARGUMENT
def test_a_bad_argument(op, name):
    refused = 0
    for change, args in changed_calls(op, name):
        try:
            refused += outcome(op, args) is not None
        except AssertionError as error:
            raise AssertionError(f"{name}, {change}: {error}") from error
    assert refused > 0 or name in ANYTHING


ABOUT_NUMBERS = re.compile(
    r"between 0 and the|fall, got|ascend, got|(positions|kept) must be from|num_tokens must be at most|than 2\*\*63|"
    "order must hold|-1 must come last|rows must be the same or apart"
)
"""What the CPU says of numbers in tensors, which only kernels on a GPU know there, and of memory."""


@EVERY_ARGUMENT
def test_launchers_refuse_what_the_cpu_refuses(op, name):
    """And nothing else, but for other devices, and the transposed layout, at which the CPU does not look."""
    signature = signatures()[op]
    for change, args in changed_calls(op, name):
        on_cpu = outcome(op, args)
        if ABOUT_NUMBERS.search(str(on_cpu)) or "nothing" in change:
            continue
        of_launcher = refusal(op, signature.check, dict(zip((x.name for x in arguments(op)), args, strict=True)))
        if "meta" in change:
            assert of_launcher is not None or op == "periodic_shift"  # whose only tensor it is
        elif name not in ("column_offsets", "rows"):
            assert (on_cpu is None) == (of_launcher is None), f"{change}: CPU {on_cpu!r}, launchers {of_launcher!r}"


X, VIDEO, LAYOUT = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 2, 4), layout_of([[0]], 2, 2, 1)
NUMBERED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "latent_attention": (lambda seed: attend_latents(X, [X, X], [X, X], None, 0.3, seed, 1.0), 4 + 3 + 6),
    "leap_attention": (lambda seed: attend_frames(VIDEO, VIDEO, VIDEO, 1, 2, 0, 0.3, seed, 1.0), 4 + 6 + 6),
    "axial_attention": (lambda seed: attend_lines(VIDEO, VIDEO, VIDEO, 0, 0.3, seed, 1.0), 4 + 6 + 6),
    "edge_sparse_attention": (
        lambda seed: attend_blocks(X, X, X, LAYOUT, None, None, False, 0.3, seed, 1.0, False), 4 + 3 + 3
    ),
    "node_sparse_attention": (
        lambda seed: attend_kept(X[:, :, :2], X, X, torch.zeros(2, 1).long(), None, 0.3, seed, 1.0), 4 + 2 + 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", NUMBERED)
def test_how_many_numbers_a_seed_has(op):
    """One for each batch and head, each query and each key, or none; the kernels and their launchers count."""
    call, count = NUMBERED[op]
    with Record() as record:
        for length in (1, 1 + count):
            call(torch.zeros(length, dtype=torch.int64))
    (*args,) = record.calls[op][-1]
    at = [x.name for x in arguments(op)].index("seed")
    for length in (0, 2, count, 2 + count):
        args[at] = torch.zeros(length, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"^{op}: seed must"):
            getattr(torch.ops.vattn, op)(*args)
        with pytest.raises(ValueError, match=f"^{op}: seed must have shape"):
            signatures()[op].check(dict(zip((x.name for x in arguments(op)), args, strict=True)))


def test_a_launch_is_held_to_the_signature():
    query, wrong = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 5)
    launched = vattn.ops.OPERATORS["latent_attention"]
    with pytest.raises(ValueError, match=r"latent_attention: keys\[0\] must have shape \(B H Lk\[\] D\)"):
        _operator.launcher(launched, "latent_attention.forward")(query, [wrong], [wrong], None, 0.0, None, 1.0)
