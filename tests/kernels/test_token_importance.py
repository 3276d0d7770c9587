"""What only token importance has: positions, lengths of keys, and sums that are 1."""

import pytest
import torch

from tests.kernels.checks import check, run
from tests.kernels.sizes import BLOCK_Q
from tests.operators.edge_sparse_attention import TOKENS, WINDOW
from tests.operators.token_importance import OPERATOR as IMPORTANCE


@pytest.mark.parametrize("num_global", [0, 1, BLOCK_Q + 1])
@pytest.mark.parametrize("kind", ["full", "shared", "of samples"])
def test_position_bias(kind, num_global, backend):
    """Self-attention of global tokens and others, anywhere in the grid."""
    tokens = TOKENS if kind == "full" else 19
    positions = torch.stack([torch.randperm(TOKENS, device=backend.device)[:tokens] for _ in range(2)])
    positions = {"full": None, "shared": positions[0], "of samples": positions}[kind]
    sizes = {"B": 2, "queries": num_global + tokens, "keys": num_global + tokens, "G": num_global, "window": WINDOW}
    check(backend, IMPORTANCE.make(backend.device, **sizes, positions=positions))


@pytest.mark.parametrize("bias", [{}, {"G": 2, "window": WINDOW}], ids=["plain", "bias"])
def test_key_lengths(bias, backend):
    """What lies behind them gets nothing, and is not read."""
    lengths = torch.tensor([0, 1, 17, 26], device=backend.device)
    case = IMPORTANCE.make(backend.device, B=4, queries=26, keys=26, key_lengths=lengths, **bias)
    importance = check(backend, case)["importance"]
    for b, length in enumerate(lengths.tolist()):
        assert (importance[b, length:] == 0).all()
        torch.testing.assert_close(importance[b].sum().cpu(), torch.tensor(float(length > 0)))
        case.tensors["key"][b, :, length:] = torch.nan
    assert torch.equal(run(backend, case)["importance"], importance)


@pytest.mark.parametrize("bias", [{}, {"G": 2, "window": WINDOW}], ids=["plain", "bias"])
def test_given_lse(bias, backend):
    """That of more keys, whose part these receive; a query of -inf gives nothing, whatever it is."""
    lse = (4 + torch.randn(26, 2, 3, device=backend.device)).permute(1, 2, 0)
    lse[1, 2, 5] = -torch.inf
    lengths = torch.tensor([26, 17], device=backend.device)
    sizes = {"B": 2, "H": 3, "queries": 26, "keys": 26, "key_lengths": lengths, "lse": lse}
    check(backend, IMPORTANCE.make(backend.device, **sizes, **bias))


def test_the_lse_of_its_own_keys_changes_nothing(backend):
    case = IMPORTANCE.make(backend.device, B=2, H=2, queries=9, keys=21)
    query, key = case.tensors.values()
    lse = (query @ key.mT * case.settings["scale"]).logsumexp(-1)
    own = run(backend, case)["importance"]
    case.settings["lse"] = lse
    torch.testing.assert_close(check(backend, case)["importance"], own)
