"""What only edge-sparse attention has: layouts of blocks, global tokens, a bias table with a gradient, importance."""

import dataclasses

import pytest
import torch

from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_same_bits, check, check_jvp, run
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, LONG_EDGES
from tests.operators.edge_sparse_attention import OPERATOR as EDGES
from tests.operators.edge_sparse_attention import TOKENS, WINDOW
from vattn.kernels import configs

SOME = [[0, 2], [1, 3, 0], [3], [2, 2, 1]]  # of four blocks, the last of which may be short


def grid(device, *, rows=((0, 1), (1,)), block_size=7, N=13, **sizes):
    """Two blocks, of which one reads both."""
    return EDGES.make(device, rows=rows, block_size=block_size, N=N, **sizes)


@pytest.mark.parametrize(("num_global", "window"), [(0, WINDOW), (1, ()), (3, WINDOW)], ids=["0", "1 plain", "3"])
@pytest.mark.parametrize(
    "rows",
    [SOME, [[3, 1], [], [3, 0, 3], []], [[], [], [], []], [[0, 1, 2, 3]] * 4],
    ids=["some", "empty rows, and a short block first", "nothing", "everything"],
)
def test_layouts(rows, num_global, window, backend):
    """Duplicates, empty rows, and a short last block anywhere in a row."""
    check(backend, EDGES.make(backend.device, rows=rows, block_size=7, N=23, G=num_global, window=window))


def test_a_layout_per_head(backend):
    other = [[], [0, 1, 2, 3], [1], [3]]
    check(backend, EDGES.make(backend.device, rows=SOME, more=[other], block_size=6, N=TOKENS, H=2))


@pytest.mark.parametrize("num_global", [BLOCK_Q + 3, BLOCK_K + 1])
def test_many_global_tokens(num_global, backend):
    """More than a tile has, and more than a block has: the list of a row begins with several blocks of them."""
    check(backend, EDGES.make(backend.device, rows=[[0], [0, 1]], block_size=5, N=9, G=num_global))


def test_global_tokens_alone(backend):
    check(backend, EDGES.make(backend.device, rows=[], block_size=5, N=0, G=3))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", ["full", "shared", "of samples"])
@pytest.mark.parametrize("window", [WINDOW, ()], ids=["bias", "plain"])
def test_positions(window, kind, causal, backend):
    """Tokens anywhere in the grid, two of them in one place."""
    positions = torch.stack([torch.randperm(TOKENS, device=backend.device)[:11] for _ in range(2)])
    positions[:, 4] = positions[:, 9]
    positions = {"full": None, "shared": positions[0], "of samples": positions}[kind]
    sizes = {"rows": [[0, 1], [1, 0]], "block_size": 6, "N": 11, "B": 2, "window": window}
    check(backend, EDGES.make(backend.device, **sizes, positions=positions, causal=causal))


@pytest.mark.parametrize("per_sample", [False, True])
def test_causal_positions_of_64_bits(per_sample, backend):
    """Any int64 has its place in the order: below 0, above 2**31, and two that are equal in their last 32 bits."""
    positions = torch.tensor([2**40 + 3, -(2**35), 2**32 + 7, 7, -1, 2**63 - 1, -(2**63), 7, 0, 2**31, 2**40 + 4, 5, 2])
    positions = torch.stack([positions, positions.flip(0)]) if per_sample else positions
    sizes = {"rows": [[0, 1], [1, 0]], "block_size": 7, "N": 13, "B": 2, "window": ()}
    check(backend, EDGES.make(backend.device, **sizes, positions=positions.to(backend.device), causal=True))


def test_causal_queries_without_keys(backend):
    """The first tokens of all read later blocks only, and there is no global token."""
    found = check(backend, EDGES.make(backend.device, rows=[[1], [0]], block_size=5, N=10, G=0, causal=True))
    assert (found["out"][:, :, :5] == 0).all() and (found["lse"][:, :, :5] == -torch.inf).all()


@pytest.mark.parametrize("window", [(1, 1, TOKENS), (TOKENS, 1, 1), (1, 5, 5)], ids=str)
def test_windows(window, backend):
    check(backend, grid(backend.device, block_size=12, N=TOKENS, G=2, window=window, deterministic=True))


def test_positions_out_of_the_window(backend):
    """A GPU would have to wait for an error, so they are clamped."""
    wrong, clamped = torch.arange(TOKENS, device=backend.device), torch.arange(TOKENS, device=backend.device)
    wrong[3], wrong[5], clamped[3], clamped[5] = -7, 2**40, 0, TOKENS - 1
    case = grid(backend.device, block_size=12, N=TOKENS, positions=wrong, scale=0.3, deterministic=True)
    if backend.name == "cpp":
        with pytest.raises(ValueError, match=f"positions must be from 0 to below {TOKENS}"):
            run(backend, case)
        return
    found = run(backend, case)
    case.settings["positions"] = clamped
    assert_same_bits(found, run(backend, case))


@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_dropout_of_two_global_tokens(deterministic, dropout_p, backend):
    sizes = {"rows": [[0, 1], [1, 1]], "block_size": 9, "N": 17, "H": 2, "G": 2}
    check(backend, EDGES.make(backend.device, **sizes, dropout_p=dropout_p, deterministic=deterministic))


def test_this_length_is_split():
    """Of what global queries read, and of who reads global keys: a path that the contracts try."""
    assert configs.splits(1, -(-LONG_EDGES // BLOCK_K), torch.empty(0)) == 2


def test_tangents_of_splits_of_two_heads(backend):
    """Splits leave tangents of global queries alone, and read the lse of all queries."""
    check_jvp(
        backend, EDGES.make(backend.device, rows=[[]], block_size=LONG_EDGES - 1, N=LONG_EDGES - 1, H=2, window=())
    )


def test_strided_table_and_positions(backend):
    positions = torch.randint(0, TOKENS, (13, 2), device=backend.device).T
    case = grid(backend.device, B=2, H=2, positions=positions)
    check(backend, case.replace(table=case.tensors["table"].T.contiguous().T))


def test_deterministic_table_gradient_with_large_gradients(backend):
    """The unit follows the inputs: nothing overflows, and nothing is lost."""
    case = grid(backend.device, deterministic=True)
    for factor in (1e-20, 1e15):
        grads = {name: grad * factor for name, grad in case.grads.items()}
        check(backend, dataclasses.replace(case, grads=grads))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_deterministic_table_gradient_is_nan_where_a_gradient_is(backend):
    """And nothing is written beside the table."""
    case = grid(backend.device, deterministic=True)
    case.grads["out"][0, 0, 3, 2] = torch.inf
    assert run(backend, case)["dtable"].isnan().any()


def test_importance_is_a_distribution(backend):
    """Before dropout; what is missing goes to the global tokens."""
    case = EDGES.make(backend.device, rows=[[1, 0], [1]], block_size=7, N=13, G=2, B=2, dropout_p=0.5)
    importance = run(backend, case)["importance"]
    case.settings.update(dropout_p=0.0, seed=None)
    torch.testing.assert_close(importance, run(backend, case)["importance"])
    assert (importance > 0).all() and (importance.sum(1) < 1).all()


@pytest.mark.parametrize(("num_global", "window"), [(0, WINDOW), (1, ()), (3, WINDOW)], ids=["0", "1 plain", "3"])
def test_tangents_of_layouts(num_global, window, backend):
    """Duplicates, an empty row, rows per head, and a short last block anywhere in a row."""
    sizes = {"rows": SOME, "more": [[[3, 1], [], [3, 0, 3], []]], "block_size": 7, "N": 23, "H": 2}
    check_jvp(backend, EDGES.make(backend.device, **sizes, G=num_global, window=window))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", [WINDOW, ()], ids=["bias", "plain"])
def test_tangents_of_positions(window, causal, backend):
    positions = torch.stack([torch.randperm(TOKENS, device=backend.device)[:11] for _ in range(2)])
    sizes = {"rows": [[0, 1], [1, 0]], "block_size": 6, "N": 11, "B": 2, "window": window}
    check_jvp(backend, EDGES.make(backend.device, **sizes, positions=positions, causal=causal))


def test_tangents_of_causal_queries_without_keys(backend):
    found = check_jvp(backend, EDGES.make(backend.device, rows=[[1], [0]], block_size=5, N=10, G=0, causal=True))
    assert (found["out"][:, :, :5] == 0).all() and (found["lse"][:, :, :5] == 0).all()


def test_a_table_without_a_tangent(backend):
    case = grid(backend.device)
    tangents = case.random_tangents()
    del tangents["table"]
    check_jvp(backend, case, tangents)


def test_strided_table_and_its_tangent(backend):
    case = grid(backend.device, H=2)
    tangents = case.random_tangents()
    tangents["table"] = tangents["table"].T.contiguous().T
    check_jvp(backend, case.replace(table=case.tensors["table"].T.contiguous().T), tangents)
    check_jvp(backend, case, tangents | {"table": tangents["table"][:1, :1].expand_as(tangents["table"])})


@pytest.mark.parametrize("name", ["B", "H"])
def test_deterministic_gradient_of_the_table_of_nothing(name, backend):
    case = EDGES.make(backend.device, rows=[[0]], N=4, deterministic=True, **{name: 0})
    assert (run(backend, case)["dtable"] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_score_that_is_not_finite_shows_in_the_gradient_of_the_table(deterministic):
    """Also where it is added up in integers, which have no NaN."""
    backend = BACKENDS["triton"]
    case = EDGES.make(backend.device, rows=[[0, 1], [1, 1]], block_size=7, N=13, deterministic=deterministic)
    case.tensors["query"][0, 0, 5, 2] = torch.nan
    assert run(backend, case)["dtable"].isnan().any()
