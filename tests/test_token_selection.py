"""Token importance and the selection of tokens through their public functions."""

import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vattn
from vattn import RelativePositionBias3D, _library

needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def random_bias(window: tuple[int, int, int], num_heads: int, num_global: int = 1) -> RelativePositionBias3D:
    bias = RelativePositionBias3D(window, num_heads, num_global)
    torch.nn.init.normal_(bias.table)
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["plain", "key_lengths", "position_bias", "positions"])
def test_importance_is_the_mean_of_the_probabilities(case, dtype):
    query, key = torch.randn(2, 3, 7, 8).to(dtype), torch.randn(2, 3, 7, 8).to(dtype)
    if case in ("plain", "key_lengths"):
        query = query[:, :, :4]
    bias = random_bias((2, 2, 2), 3)
    positions, key_lengths = torch.tensor([[0, 7, 3, 2, 1, 6], [1, 2, 3, 4, 5, 7]]), torch.tensor([7, 2])
    settings: dict[str, Any] = {
        "plain": {"scale": 0.7},
        "key_lengths": {"key_lengths": key_lengths, "scale": 0.7},
        "position_bias": {"position_bias": bias, "scale": 0.7},
        "positions": {"position_bias": bias, "positions": positions, "scale": 0.7},
    }[case]
    scores = 0.7 * query @ key.mT
    if "position_bias" in settings:
        scores = scores + (bias(positions) if case == "positions" else bias(torch.arange(6)))
    if case == "key_lengths":
        scores[1, :, :, 2:] = -torch.inf
    expected = scores.softmax(-1).mean((1, 2)).detach()
    importance = vattn.token_importance(query, key, **settings)
    assert importance.dtype == dtype
    torch.testing.assert_close(importance, expected)


def test_importance_has_no_gradient():
    query, key = torch.randn(2, 1, 3, 5, 8).requires_grad_().unbind()
    assert not vattn.token_importance(query, key, position_bias=random_bias((1, 2, 2), 3)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_importance_of_nothing_and_for_nobody(dtype):
    tokens = torch.randn(2, 3, 5, 8, dtype=dtype)
    assert torch.equal(vattn.token_importance(tokens[:, :, :0], tokens), tokens.new_zeros(2, 5))
    assert vattn.token_importance(tokens, tokens[:, :, :0]).shape == (2, 0)
    none = vattn.token_importance(tokens, tokens, key_lengths=torch.tensor([0, 5]))
    assert (none[0] == 0).all() and torch.isclose(none[1].sum(), tokens.new_ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_importance_of_a_given_lse(dtype):
    """exp(score - lse), of which a query of -inf gives nothing, one of inf neither, and NaN is everywhere."""
    query, key = torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 3, 7, 8, dtype=dtype)
    lse = torch.randn(2, 3, 4, dtype=dtype).requires_grad_()
    importance = vattn.token_importance(query, key, lse=lse, scale=0.7)
    assert not importance.requires_grad
    torch.testing.assert_close(importance, (0.7 * query @ key.mT - lse[..., None]).exp().mean((1, 2)).detach())
    own = (0.7 * query @ key.mT).logsumexp(-1)
    plain = vattn.token_importance(query, key, scale=0.7)
    torch.testing.assert_close(vattn.token_importance(query, key, lse=own, scale=0.7), plain)
    with torch.no_grad():
        lse[0, 0, 1], lse[0, 2, 3], lse[1, 1, 1] = -torch.inf, torch.inf, torch.nan
    weights = (0.7 * query @ key.mT - lse[..., None]).exp()
    weights[0, 0, 1] = 0
    found = vattn.token_importance(query, key, lse=lse, scale=0.7, key_lengths=torch.tensor([7, 5]))
    torch.testing.assert_close(found[0], weights[0].mean((0, 1)).detach())
    assert found[1, :5].isnan().all() and (found[1, 5:] == 0).all()
    together = torch.vmap(lambda *x: vattn.token_importance(x[0], x[1], lse=x[2]))(
        query[:, None], key[:, None], own[:, None]
    )
    torch.testing.assert_close(together[:, 0], vattn.token_importance(query, key, lse=own))


def picked(importance: list[float], keep: float, dtype: torch.dtype = torch.float32) -> list[int]:
    """The tokens that stay; all ways to say so agree."""
    scores = torch.tensor([importance], dtype=torch.float64).to(dtype)
    tokens = torch.arange(float(2 + len(importance))).view(1, -1, 1)
    kept, positions = vattn.select_tokens(tokens, scores, keep, num_global=2)
    assert kept[0, :2, 0].tolist() == [0, 1]
    assert (kept[0, 2:, 0] - 2).tolist() == positions[0].tolist()
    return positions[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("importance", "keep", "expected"),
    [
        pytest.param([0.1, 0.4, 0.2, 0.5, 0.3], 3, [1, 3, 4], id="old order"),
        pytest.param([0.1, 0.4, 0.2, 0.4, 0.4], 2, [1, 3], id="ties go to the first"),
        pytest.param([0.0, -0.0, 0.0, -0.0], 2, [0, 1], id="zeros are equal"),
        pytest.param([1.0] * 6, 4, [0, 1, 2, 3], id="all equal"),
        pytest.param([0.1, NAN, 0.2, INF, NAN], 2, [1, 4], id="NaN first"),
        pytest.param([NAN, -NAN, NAN, 2.0], 2, [0, 1], id="NaN are equal"),
        pytest.param([0.1, INF, -INF, 5.0, -1.0], 2, [1, 3], id="infinity"),
        pytest.param([-INF, -INF, -1.0, -2.0], 3, [0, 2, 3], id="negative infinity"),
        pytest.param([0.3, 0.1, 0.2], 0, [], id="none"),
        pytest.param([0.3, 0.1, 0.2], 3, [0, 1, 2], id="all"),
        pytest.param([0.3, 0.1, 0.2], 0.0, [], id="share 0"),
        pytest.param([0.3, 0.1, 0.2], 1.0, [0, 1, 2], id="share 1"),
        pytest.param([0.3, 0.1, 0.2], 0.34, [0, 2], id="share rounds up"),
        pytest.param([], 0.5, [], id="no tokens"),
    ],
)
def test_selection(importance, keep, expected, dtype):
    assert picked(importance, keep, dtype) == expected


@pytest.mark.parametrize(("share", "count", "expected"), [(0.55, 100, 56), (0.7, 10, 7), (0.1, 30, 3), (0.3, 10, 3)])
def test_a_share_rounds_up_in_float64(share, count, expected):
    """Of 0.55 * 100, which is above 55 in float64, 56 stay."""
    _, positions = vattn.select_tokens(torch.randn(1, 1 + count, 2), torch.rand(1, count), share)
    assert positions.shape == (1, expected)


def test_selecting_twice_composes_positions():
    tokens, importance = torch.randn(2, 1 + 20, 3), torch.rand(2, 20)
    once, positions = vattn.select_tokens(tokens, importance, 10)
    twice, positions = vattn.select_tokens(once, importance.gather(1, positions), 4, positions=positions)
    directly, expected = vattn.select_tokens(tokens, importance, 4)
    assert torch.equal(twice, directly) and torch.equal(positions, expected)


def test_second_derivatives_of_a_selection():
    """It is linear: the kernel, too, has them."""
    tokens = torch.randn(1, 5, 3).requires_grad_()
    kept, _ = vattn.select_tokens(tokens, torch.tensor([[0.1, 0.9, 0.8, 0.2]]), 2)
    (grad,) = torch.autograd.grad(kept.pow(3).sum(), tokens, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), tokens)
    expected = (6 * tokens).detach()
    expected[:, [1, 4]] = 0
    torch.testing.assert_close(second, expected)


@needs_kernels
def test_opcheck():
    tokens, importance = torch.randn(2, 7, 3).requires_grad_(), torch.rand(2, 5)
    for positions in (None, torch.arange(5) * 2):
        args = (tokens, importance, 3, positions, 2)
        torch.library.opcheck(torch.ops.vattn.select_tokens.default, args)
    grad, index = torch.randn(2, 5, 3).requires_grad_(), torch.tensor([[0, 1, 4], [2, 3, 4]])
    torch.library.opcheck(torch.ops.vattn.select_tokens_backward.default, (grad, index, 5, 2))
    query, table = torch.randn(2, 2, 5, 8), torch.randn(3 * 3 + 3, 2)
    for args in (
        (query, query, table, [1, 2, 2], 1, None, torch.tensor([3, 5]), torch.randn(2, 2, 5), 0.5),
        (query[:, :, :2], query, None, [], 0, None, None, None, 0.5),
    ):
        torch.library.opcheck(torch.ops.vattn.token_importance.default, args)


@needs_kernels
def test_changing_lengths_compile_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def prune(tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        heads = tokens.unflatten(-1, (2, 4)).transpose(1, 2)
        importance = vattn.token_importance(text, heads[:, :, 1:])
        return vattn.select_tokens(tokens, importance, 0.6)

    for length in (40, 60, 33, 90, 10):
        kept, positions = prune(torch.randn(2, 1 + length, 8).requires_grad_(), torch.randn(2, 2, 5, 4))
        assert positions.shape == (2, -(-length * 6 // 10)) and kept.shape == (2, 1 + positions.shape[1], 8)
        kept.sum().backward()
    assert counter.frame_count <= 2


def test_autocast_casts_the_queries_and_leaves_the_tokens():
    query, tokens = torch.randn(1, 2, 5, 8), torch.randn(1, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        importance = vattn.token_importance(query, query)
        kept, _ = vattn.select_tokens(tokens, importance, 2)
    assert importance.dtype == torch.float32 and kept.dtype == torch.float32
    assert torch.equal(importance, vattn.token_importance(query.bfloat16(), query.bfloat16()))


def test_any_device_with_a_fake_kernel():
    tokens = torch.empty(2, 3, 7, 8, device="meta")
    importance = vattn.token_importance(tokens, tokens, position_bias=RelativePositionBias3D((1, 2, 3), 3).to("meta"))
    assert importance.shape == (2, 7)
    kept, positions = vattn.select_tokens(tokens[:, 0], importance[:, 1:], 0.5)
    assert kept.shape == (2, 4, 8) and positions.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
def test_a_position_out_of_range_is_an_error(dtype):
    query = torch.zeros(1, 3, 3, 8, dtype=dtype)
    with pytest.raises(ValueError, match="token_importance: positions must be"):
        vattn.token_importance(query, query, position_bias=random_bias((1, 2, 2), 3), positions=torch.tensor([0, 4]))


Q, K = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8)
BIAS = RelativePositionBias3D((1, 1, 3), 2)


@pytest.mark.parametrize(
    ("change", "error", "must"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor, got query=list"),
        ({"key": K[0]}, ValueError, "key must have shape (B, H, Lk, D), got key.shape=(2, 5, 8)"),
        (
            {"key": K.half()},
            TypeError,
            "key must have the dtype of query (torch.float32), got key.dtype=torch.float16",
        ),
        (
            {"key": K[:, :1]},
            ValueError,
            "key must have the batch, heads and head_dim of query (1, 2, 4, 8), got key.shape=(1, 1, 5, 8)",
        ),
        (
            {"position_bias": BIAS},
            ValueError,
            "with position_bias query and key must be the same tokens, at least position_bias.num_global (1), "
            "got query.shape=(1, 2, 4, 8), key.shape=(1, 2, 5, 8)",
        ),
        (
            {"position_bias": RelativePositionBias3D((1, 1, 3), 2, 5), "key": Q},
            ValueError,
            "with position_bias query and key must be the same tokens, at least position_bias.num_global (5), "
            "got query.shape=(1, 2, 4, 8), key.shape=(1, 2, 4, 8)",
        ),
        (
            {"position_bias": "bias", "key": Q},
            TypeError,
            "position_bias must be a RelativePositionBias3D, got position_bias=str",
        ),
        (
            {"position_bias": BIAS, "key": Q, "positions": torch.arange(4)},
            ValueError,
            "positions must have shape (3,) or (1, 3), got positions.shape=(4,)",
        ),
        (
            {"positions": torch.arange(4)},
            ValueError,
            "positions must come with position_bias, got position_bias=None",
        ),
        ({"key_lengths": [3]}, TypeError, "key_lengths must be an int32 or int64 tensor, got key_lengths=[3]"),
        ({"lse": 3.0}, TypeError, "lse must be a torch.Tensor, got lse=float"),
        ({"lse": Q[..., 0].double()}, TypeError, "lse must be torch.float32, got lse.dtype=torch.float64"),
        ({"lse": Q}, ValueError, "lse must have shape (1, 2, 4), got lse.shape=(1, 2, 4, 8)"),
        (
            {"lse": Q[..., 0].to("meta")},
            ValueError,
            "lse must be on the device of query (cpu), got lse.device=meta",
        ),
        ({"scale": INF}, ValueError, "scale must be finite, got scale=inf"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_errors_of_importance(change, error, must):
    with pytest.raises(error, match=f"^token_importance: {re.escape(must)}$"):
        vattn.token_importance(**{"query": Q, "key": K, **change})


TOKENS, IMPORTANCE = torch.zeros(2, 6, 3), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "error", "must"),
    [
        (
            {"tokens": TOKENS.int()},
            TypeError,
            "tokens must be float32, bfloat16, float16 or float64, got tokens.dtype=torch.int32",
        ),
        ({"tokens": TOKENS[0]}, ValueError, "tokens must have shape (B, G+N, C), got tokens.shape=(6, 3)"),
        ({"importance": None}, TypeError, "importance must be a torch.Tensor, got importance=NoneType"),
        ({"importance": IMPORTANCE[:1]}, ValueError, "importance must have shape (2, 5), got importance.shape=(1, 5)"),
        ({"num_global": 2}, ValueError, "importance must have shape (2, 4), got importance.shape=(2, 5)"),
        ({"num_global": -1}, ValueError, "num_global must be at least 0, got num_global=-1"),
        (
            {"importance": IMPORTANCE.to("meta")},
            ValueError,
            "importance must be on the device of tokens (cpu), got importance.device=meta",
        ),
        ({"keep": 6}, ValueError, "keep must be between 0 and the number of tokens (5), got keep=6"),
        ({"keep": -1}, ValueError, "keep must be between 0 and the number of tokens (5), got keep=-1"),
        ({"keep": 1.5}, ValueError, "keep as a share must be between 0.0 and 1.0, got keep=1.5"),
        ({"keep": NAN}, ValueError, "keep as a share must be between 0.0 and 1.0, got keep=nan"),
        ({"keep": True}, TypeError, "keep must be an int or a float, got keep=True"),
        ({"keep": "3"}, TypeError, "keep must be an int or a float, got keep='3'"),
        (
            {"positions": torch.arange(6)},
            ValueError,
            "positions must have shape (5,) or (2, 5), got positions.shape=(6,)",
        ),
        (
            {"positions": torch.arange(5).int()},
            TypeError,
            "positions must be an int64 tensor, got positions.dtype=torch.int32",
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_errors_of_selection(change, error, must):
    with pytest.raises(error, match=f"^select_tokens: {re.escape(must)}$"):
        vattn.select_tokens(**{"tokens": TOKENS, "importance": IMPORTANCE, "keep": 2, **change})
