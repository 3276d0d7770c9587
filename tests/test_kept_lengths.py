"""Lists of kept keys of samples that keep different numbers of them: what is behind a list's length is not there."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vattn
from vattn import _library

needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
WIDE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, WIDE], ids=str)
@pytest.mark.parametrize("lengths", [[0, 2], [3, 0], [1, 3]], ids=str)
def test_kept_lengths_are_shorter_lists(lengths, dtype):
    """Out, lse, gradients and tangents are those of a list of each sample's own; what is behind may be anything."""
    query, key, value = leaf(2, 3, 4, 8, dtype=dtype), leaf(2, 3, 6, 8, dtype=dtype), leaf(2, 3, 6, 8, dtype=dtype)
    kept = torch.tensor([[5, 0, 5], [1, 1, 2]])
    garbage, counts = kept.clone(), torch.tensor(lengths)
    for b, length in enumerate(lengths):
        garbage[b, length:] = torch.tensor([-1, 2**62, 6])[length:]

    def together(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return vattn.node_sparse_attention(q, k, v, garbage, kept_lengths=counts, return_lse=True)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Any:
        found = [
            vattn.node_sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], kept[b : b + 1, :n], return_lse=True)
            for b, n in enumerate(lengths)
        ]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    leaves, along = [query, key, value], tuple(torch.randn_like(x.detach()) for x in (query, key, value))
    for x, y in zip(together(*leaves), one_by_one(*leaves), strict=True):
        torch.testing.assert_close(x, y)
    grad = torch.randn(2, 3, 4, 8).to(dtype)
    grads = [torch.autograd.grad(f(*leaves)[0], leaves, grad) for f in (together, one_by_one)]
    tangents = [torch.func.jvp(f, tuple(x.detach() for x in leaves), along)[1] for f in (together, one_by_one)]
    for x, y in zip([*grads[0], *tangents[0]], [*grads[1], *tangents[1]], strict=True):
        torch.testing.assert_close(x, y)
    behind = together(query, key.detach().index_fill(2, torch.tensor([3, 4]), torch.nan), value)
    torch.testing.assert_close(behind, together(*leaves))


def test_gradcheck_of_kept_lengths():
    kept, lengths = torch.tensor([[0, 4, 4], [3, 1, 9]]), torch.tensor([3, 2], dtype=torch.int32)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        torch.manual_seed(1)
        return vattn.node_sparse_attention(
            query, key, value, kept, kept_lengths=lengths, dropout_p=0.4, return_lse=True
        )

    tensors = [leaf(2, 2, length, 2, dtype=WIDE) for length in (3, 5, 5)]
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@needs_kernels
def test_kept_lengths_compile():
    """One graph, whatever they are."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    query, key, value = (leaf(2, 2, 5, 6) for _ in range(3))
    kept = torch.tensor([[0, 4, 4], [3, 1, 2]])

    def attend(query: Tensor, lengths: Tensor) -> Any:
        return vattn.node_sparse_attention(query, key, value, kept, kept_lengths=lengths)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in (torch.tensor([3, 1]), torch.tensor([0, 2])):
        expected, actual = attend(query, lengths), compiled(query, lengths)
        torch.testing.assert_close(actual, expected)
        for x, y in zip(*(torch.autograd.grad(x.sin().sum(), query) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=["kernel", "reference"])
def test_no_keys_for_a_list(dtype):
    """It may be there if none of it is read."""
    query, key = leaf(2, 3, 4, 8, dtype=dtype), leaf(2, 3, 0, 8, dtype=dtype)
    kept, none = torch.tensor([[7], [-7]]), torch.zeros(2, dtype=torch.int64)
    out, lse = vattn.node_sparse_attention(query, key, key, kept, kept_lengths=none, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="node_sparse_attention: kept"):
        vattn.node_sparse_attention(query, key, key, kept, kept_lengths=none + 1)


@needs_kernels
@pytest.mark.parametrize("length", [-1, 3])
def test_a_length_out_of_range_is_an_error(length):
    query = torch.zeros(1, 2, 9, 8)
    match = r"node_sparse_attention: kept_lengths must be between 0 and the number of entries of kept \(2\), got"
    with pytest.raises(ValueError, match=f"{match} kept_lengths\\[0\\]={length}"):
        vattn.node_sparse_attention(query, query, query, torch.tensor([[0, 1]]), kept_lengths=torch.tensor([length]))
