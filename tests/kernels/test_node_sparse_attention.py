"""What only node-sparse attention has: lists of keys, some of them twice, and gradients for those that are listed."""

import pytest
import torch

from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_same_bits, check, check_jvp, run, run_jvp
from tests.kernels.sizes import BLOCK_K, LONG
from tests.operators.node_sparse_attention import OPERATOR as NODES


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16)], ids=str
)  # fmt: skip
def test_dtypes_of_two_heads(head_dim, dtype, backend):
    check(backend, NODES.make(backend.device, dtype, H=2, queries=5, keys=30, count=11, D=head_dim))


@pytest.mark.parametrize("count", [0, 1, BLOCK_K - 1, BLOCK_K, BLOCK_K + 1, 70])
def test_counts(count, backend):
    """None, some and all of the keys; those that were not kept have a gradient of 0."""
    case = NODES.make(backend.device, B=2, queries=5, keys=70, count=count)
    found = check(backend, case)
    kept = torch.zeros(2, 70, dtype=torch.bool, device=backend.device).scatter_(1, case.settings["kept"], True)
    for grad in (found["dkey"], found["dvalue"]):
        assert torch.equal((grad[:, 0] != 0).any(-1), kept)


@pytest.mark.parametrize("queries", [3, LONG // 2], ids=["few queries", "split queries"])
def test_duplicates(queries, backend):
    """A key that is listed three times counts three times, and has three times the gradient."""
    case = NODES.make(backend.device, B=2, queries=queries, keys=9, count=20, duplicates=True)
    kept = case.settings["kept"]
    kept[0, 3] = kept[0, 11] = kept[0, 19]
    check(backend, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lengths(dropout_p, backend):
    """What is listed behind them may be anything, and keys that are listed there alone have a gradient of 0."""
    lengths = torch.tensor([0, 1, 7, 20], dtype=torch.int32, device=backend.device)
    case = NODES.make(backend.device, B=4, H=2, queries=5, keys=30, count=20, kept_lengths=lengths, dropout_p=dropout_p)
    found = check(backend, case)
    check_jvp(backend, case)
    for b, length in enumerate(lengths.tolist()):
        read = torch.zeros(30, dtype=torch.bool, device=backend.device)
        read[case.settings["kept"][b, :length]] = True
        assert (found["lse"][b] == -torch.inf).all() == (length == 0)
        assert dropout_p > 0 or torch.equal((found["dvalue"][b] != 0).any(-1).any(0), read)
        for name in ("key", "value"):
            assert (found[f"d{name}"][b, :, ~read] == 0).all()
            case.tensors[name][b, :, ~read] = torch.nan
    assert_same_bits(run(backend, case), found)


def test_lengths_of_lists_without_keys(backend):
    """A list may be as long as any where none of it is read."""
    case = NODES.make(backend.device, B=2, queries=3, keys=0, count=0)
    case.settings["kept"] = torch.tensor([[-1, 5], [0, 2**40]], device=backend.device)
    case.settings["kept_lengths"] = torch.zeros(2, dtype=torch.int64, device=backend.device)
    found = check(backend, case)
    check_jvp(backend, case)
    assert (found["out"] == 0).all() and (found["lse"] == -torch.inf).all()


def test_strided_list(backend):
    case = NODES.make(backend.device, **NODES.strided["kept"])
    case.settings["kept"] = case.settings["kept"].T.contiguous().T
    check(backend, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_tile_of_two_heads(dropout_p, backend):
    """As many listed keys as stay on chip."""
    sizes = {"B": 2, "H": 2, "queries": 20, "keys": 300, "count": 201, "duplicates": True}
    check(backend, NODES.make(backend.device, **sizes, dropout_p=dropout_p))


@pytest.mark.parametrize("count", [0, 1, BLOCK_K + 1, 70])
def test_tangents_of_counts(count, backend):
    """Those of keys that were not kept are not read."""
    case = NODES.make(backend.device, B=2, queries=5, keys=70, count=count)
    tangents = case.random_tangents()
    found = check_jvp(backend, case, tangents)
    kept = torch.zeros(2, 70, dtype=torch.bool, device=backend.device).scatter_(1, case.settings["kept"], True)
    for name in ("key", "value"):
        tangents[name][:, 0][~kept] = torch.nan
    assert_same_bits(run_jvp(backend, case, tangents), found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends all work on the device")
@pytest.mark.parametrize("index", [-1, 9])
@pytest.mark.parametrize("length", [None, 3])
def test_an_index_out_of_range_is_an_error(index, length, backend):
    """Before anything is read; in C++ it is the host that sees it."""
    case = NODES.make(backend.device, queries=5, keys=9, count=4)
    case.settings["kept"][0, 2] = index
    case.settings["kept_lengths"] = None if length is None else torch.tensor([length], device=backend.device)
    with pytest.raises(ValueError if backend.name == "cpp" else RuntimeError, match="kept must be from 0 to below"):
        run(backend, case)


@pytest.mark.gpu
def test_an_index_out_of_range_is_never_read(monkeypatch):
    """Where nobody has looked at the device's assertion yet, another key is read in its place."""
    backend = BACKENDS["triton"]
    monkeypatch.setattr(torch, "_assert_async", lambda *args: None)
    case = NODES.make(backend.device, queries=5, keys=9, count=4)
    case.settings["kept"].copy_(torch.tensor([[8, 2**40, 3, -(2**40)]]))
    found = run(backend, case)
    case.settings["kept"].clamp_(0, 8)
    assert_same_bits(run(backend, case), found)
