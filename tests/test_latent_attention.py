"""Latent attention through its public function: its tuples of keys, its lengths, its messages."""

import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vattn
from vattn import _library

needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("segments", [(4,), (2, 0, 3), (0,)], ids=str)
def test_gradcheck(segments, dropout_p):
    def attend(query: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        keys, values = tensors[: len(segments)], tensors[len(segments) :]
        out, lse = vattn.latent_attention(query, keys, values, dropout_p=dropout_p, return_lse=True)
        return (out, lse) if sum(segments) else (out,)  # finite differences of -inf are NaN

    lengths = [5, *segments, *segments]
    tensors = [leaf(1, 2, length, 3, dtype=torch.float64) for length in lengths]
    assert torch.autograd.gradcheck(attend, tensors)
    assert torch.autograd.gradgradcheck(attend, tensors)


def test_gradcheck_with_key_lengths():
    lengths = torch.tensor([1, 4, 2])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return vattn.latent_attention(query, key, value, key_lengths=lengths, return_lse=True)

    tensors = [leaf(3, 1, length, 2, dtype=torch.float64) for length in (3, 4, 4)]
    assert torch.autograd.gradcheck(attend, tensors)
    assert torch.autograd.gradgradcheck(attend, tensors)


@needs_kernels
def test_opcheck():
    seed, lengths = torch.tensor([7]), torch.tensor([3, 5])
    query, one, other = leaf(2, 2, 4, 6), leaf(2, 2, 5, 6), leaf(2, 2, 3, 6)
    for keys, key_lengths, dropout_p in (
        ([one], lengths, 0.2),
        ([one, other], None, 0.0),
        ([other[:, :, :0]], None, 0.0),
    ):
        options = (key_lengths, dropout_p, seed if dropout_p else None, 0.5)
        torch.library.opcheck(torch.ops.vattn.latent_attention.default, (query, keys, keys, *options))
        plain, plain_keys = query.detach(), [x.detach() for x in keys]
        out, lse = torch.ops.vattn.latent_attention(plain, plain_keys, plain_keys, *options)
        for grad_lse in (None, torch.randn_like(lse)):
            args = (torch.randn_like(out), grad_lse, plain, plain_keys, plain_keys, out, lse, *options)
            torch.library.opcheck(torch.ops.vattn.latent_attention_backward.default, args)
        primals = (plain, plain_keys, plain_keys)
        args = (torch.randn_like(plain), plain_keys, plain_keys, *primals, out, lse, *options)
        torch.library.opcheck(torch.ops.vattn.latent_attention_jvp.default, args)


@needs_kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["encode", "decode", "lt2l"])
def test_fifty_lengths_compile_at_most_twice(mode, backward):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(latents: Tensor, context: Tensor) -> Tensor:
        out: Any
        if mode == "encode":
            out = vattn.latent_attention(latents, context, context)
        elif mode == "decode":
            out = vattn.latent_attention(context, latents, latents, dropout_p=0.1)
        else:
            out = vattn.latent_attention(latents, (latents, context), (latents, context))
        return out.movedim(1, -2).flatten(-2)

    for length in torch.randint(2, 600, (50,)).tolist():
        latents, context = leaf(1, 2, 8, 4), leaf(1, 2, length, 4)
        out = attend(latents, context)
        assert out.shape == (1, length if mode == "decode" else 8, 8)
        if backward:
            out.sum().backward()
            assert context.grad is not None and context.grad.isfinite().all()
    assert counter.frame_count <= 2


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Tensors in tuples are cast as others are, also where their dtypes differ; float64 is not."""
    query, key, value, more = leaf(1, 2, 3, 8), leaf(1, 2, 5, 8, dtype=dtype), leaf(1, 2, 5, 8), leaf(1, 2, 4, 8)
    with torch.autocast("cpu", dtype):
        out, lse = vattn.latent_attention(query, (key, more), (value, more), return_lse=True)
        wide = [x.detach().double() for x in (query, key, value)]
        assert vattn.latent_attention(*wide).dtype == torch.float64
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = [x.to(dtype) for x in (query, key, value, more)]
    assert torch.equal(out, vattn.latent_attention(cast[0], (cast[1], cast[3]), (cast[2], cast[3])))
    leaves = [query, key, value, more]
    grads = torch.autograd.grad(out.float().sum(), leaves, retain_graph=True)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    with torch.autocast("cpu", dtype):  # a backward meets the tensors of its forward, also in here
        for x, y in zip(grads, torch.autograd.grad(out.float().sum(), leaves), strict=True):
            assert torch.equal(x, y)


def test_tuples_and_lists_mean_their_concatenation():
    query, one, other = leaf(1, 2, 3, 8), leaf(1, 2, 5, 8), leaf(1, 2, 4, 8)
    whole = torch.cat([one, other], 2)
    expected = vattn.latent_attention(query, whole, whole)
    for keys in ((one, other), [one, other]):
        torch.testing.assert_close(vattn.latent_attention(query, keys, keys), expected)
    torch.testing.assert_close(
        vattn.latent_attention(query, one, one), torch.nn.functional.scaled_dot_product_attention(query, one, one)
    )


def test_any_device_with_a_fake_kernel():
    query, key = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    out, lse = vattn.latent_attention(query, (key, key), (key, key), return_lse=True)
    assert out.shape == query.shape and lse.shape == query.shape[:-1]
    assert out.movedim(1, -2).is_contiguous()


Q, K = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8)
LENGTHS = torch.tensor([3])
DTYPES = "float32, bfloat16, float16 or float64"
FIT = "must have the batch, heads and head_dim of query (1, 2, 4, 8)"


@pytest.mark.parametrize(
    ("change", "error", "must", "got"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor", "query=list"),
        ({"query": Q.int()}, TypeError, f"query must be {DTYPES}", "query.dtype=torch.int32"),
        ({"query": Q[0]}, ValueError, "query must have shape (B, H, Lq, D)", "query.shape=(2, 4, 8)"),
        ({"query": Q[..., :0]}, ValueError, "head_dim must be between 1 and 256", "head_dim=0"),
        ({"query": Q.new_zeros(1, 1, 1, 257)}, ValueError, "head_dim must be between 1 and 256", "head_dim=257"),
        ({"key": "k"}, TypeError, "key must be a list or tuple of tensors", "key=str"),
        ({"value": None}, TypeError, "value must be a list or tuple of tensors", "value=NoneType"),
        ({"key": (), "value": ()}, ValueError, "key must have at least one element", "len(key)=0"),
        ({"key": [K, K]}, ValueError, "value must have as many tensors as key (2)", "len(value)=1"),
        ({"key": K.int()}, TypeError, f"key must be {DTYPES}", "key.dtype=torch.int32"),
        ({"key": [K, [K]], "value": [K, K]}, TypeError, "key[1] must be a torch.Tensor", "key[1]=list"),
        ({"value": K[0]}, ValueError, "value must have shape (B, H, Lk, D)", "value.shape=(2, 5, 8)"),
        (
            {"value": K.half()},
            TypeError,
            "value must have the dtype of query (torch.float32)",
            "value.dtype=torch.float16",
        ),
        ({"key": K.to("meta")}, ValueError, "key must be on the device of query (cpu)", "key.device=meta"),
        ({"key": K[:, :1]}, ValueError, f"key {FIT}", "key.shape=(1, 1, 5, 8)"),
        ({"value": (K[..., :7],)}, ValueError, f"value[0] {FIT}", "value[0].shape=(1, 2, 5, 7)"),
        (
            {"value": Q},
            ValueError,
            "key and value must be equally long",
            "key.shape=(1, 2, 5, 8), value.shape=(1, 2, 4, 8)",
        ),
        ({"key_lengths": [3]}, TypeError, "key_lengths must be an int32 or int64 tensor", "key_lengths=[3]"),
        (
            {"key_lengths": LENGTHS.float()},
            TypeError,
            "key_lengths must be an int32 or int64 tensor",
            "key_lengths.dtype=torch.float32",
        ),
        (
            {"key_lengths": LENGTHS.to("meta")},
            ValueError,
            "key_lengths must be on the device of query (cpu)",
            "key_lengths.device=meta",
        ),
        (
            {"key_lengths": LENGTHS.repeat(2)},
            ValueError,
            "key_lengths must have shape (1,)",
            "key_lengths.shape=(2,)",
        ),
        (
            {"key": (K, K), "value": (K, K), "key_lengths": LENGTHS},
            ValueError,
            "key_lengths must come with one key tensor",
            "len(key)=2",
        ),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1", "dropout_p=1.5"),
        ({"dropout_p": "0"}, TypeError, "dropout_p must be a float", "dropout_p='0'"),
        ({"scale": "1"}, TypeError, "scale must be a float or None", "scale='1'"),
        ({"scale": float("inf")}, ValueError, "scale must be finite", "scale=inf"),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x else "",
)
def test_errors(change, error, must, got):
    with pytest.raises(error, match=f"^latent_attention: {re.escape(f'{must}, got {got}')}$"):
        vattn.latent_attention(**{"query": Q, "key": K, "value": K, **change})


@needs_kernels
@pytest.mark.parametrize("length", [-1, 6])
def test_a_key_length_out_of_range_is_an_error(length):
    message = f"latent_attention: key_lengths must be between 0 and the number of keys (5), got key_lengths[0]={length}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        vattn.latent_attention(Q, K, K, key_lengths=torch.tensor([length]))


@needs_kernels
def test_the_kernel_called_directly_checks_what_it_needs():
    """torch.ops bypasses the public checks; what would read past a tensor still raises."""
    op = torch.ops.vattn.latent_attention
    with pytest.raises(ValueError, match="values must have 1 elements, got 2"):
        op(Q, [K], [K, K], None, 0.0, None, 1.0)
    with pytest.raises(ValueError, match=r"keys\[0\] must have shape \[1, 2, any, 8\], got"):
        op(Q, [K[:, :1]], [K[:, :1]], None, 0.0, None, 1.0)
    with pytest.raises(ValueError, match="dropout needs a seed"):
        op(Q, [K], [K], None, 0.5, None, 1.0)
