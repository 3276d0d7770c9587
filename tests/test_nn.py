"""The attention modules: what they compute, what they share, what they refuse."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import vattn.nn
from vattn.nn import LeapAttention, LeapAttention2d, leap_of_level

NAMES = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def plain_attention(attention: LeapAttention, x: Tensor, pairs: list[list[int]]) -> Tensor:
    """What `attention` computes without a shift, when the frames of each list attend to each other."""
    frames = x.unflatten(0, (-1, attention.num_frames))
    out = torch.empty_like(frames)
    for pair in pairs:
        tokens = frames[:, pair].flatten(1, 2)
        q, k, v = attention.qkv(tokens).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        merged = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out[:, pair] = attention.proj(merged).unflatten(1, (len(pair), -1))
    return out.flatten(0, 1)


def test_levels() -> None:
    assert [leap_of_level(level, 8) for level in (None, 0, 1, 2, 3)] == [None, 8, 4, 2, 1]
    assert leap_of_level(2, 6) == 1


@pytest.mark.parametrize(
    "level, num_frames, error, message",
    [
        (4, 8, ValueError, r"num_frames // 2\*\*level must be at least 1, got level=4, num_frames=8"),
        (-1, 8, ValueError, "level must be at least 0, got level=-1"),
        (1.0, 8, TypeError, "level must be an int, got level=1.0"),
        (1, 0, ValueError, "num_frames must be at least 1, got num_frames=0"),
    ],
)
def test_level_errors(level: Any, num_frames: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^leap_of_level: {message}$"):
        leap_of_level(level, num_frames)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(
    "leap, pairs",
    [(None, [[0], [1], [2], [3]]), (1, [[0, 1], [2, 3]]), (2, [[0, 2], [1, 3]]), (3, [[0, 3], [1], [2]])],
)
def test_attends_within_pairs(leap: int | None, pairs: list[list[int]], qkv_bias: bool) -> None:
    attention = LeapAttention(12, 3, num_frames=4, leap=leap, qkv_bias=qkv_bias)
    x = torch.randn(2 * 4, 5, 12)
    torch.testing.assert_close(attention(x), plain_attention(attention, x, pairs))


def test_shift_comes_before_the_projection() -> None:
    attention = LeapAttention(12, 3, num_frames=4, leap=2, fold_div=2)
    x = torch.randn(4, 5, 12)
    shifted, projection = attention(x), attention.proj
    attention.fold_div, attention.proj = 0, nn.Identity()
    heads = attention(x).view(1, 4, 5, 3, 4).permute(0, 3, 1, 2, 4)  # (B, H, T, N, D)
    merged = vattn.periodic_shift(heads, 2).movedim(1, -2).flatten(-2)[0]
    torch.testing.assert_close(shifted, projection(merged))


def test_on_maps_is_the_same_as_on_tokens() -> None:
    on_maps = LeapAttention2d(12, 3, num_frames=4, leap=2, fold_div=4, qkv_bias=True, head_dim=8, proj_bias=False)
    on_tokens = LeapAttention(12, 3, num_frames=4, leap=2, fold_div=4, qkv_bias=True, head_dim=8, proj_bias=False)
    on_tokens.load_state_dict({name: weight.squeeze() for name, weight in on_maps.state_dict().items()})
    maps = torch.randn(2 * 4, 12, 3, 5)
    tokens = on_tokens(maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(on_maps(maps), tokens.transpose(1, 2).unflatten(2, (3, 5)))


class Recorder:
    """Keeps what the operator was called with, and what it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operator = vattn.nn.leap.leap_attention
        monkeypatch.setattr(vattn.nn.leap, "leap_attention", self)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        self.inputs, self.settings = inputs, settings
        self.out: Any = self.operator(*inputs, **settings)
        return self.out


@pytest.mark.parametrize("module", [LeapAttention, LeapAttention2d])
def test_heads_are_views(module: type[LeapAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    attention = module(12, 3, num_frames=4, leap=2, fold_div=4)
    merged: list[Tensor] = []
    attention.proj.register_forward_pre_hook(lambda _module, inputs: merged.append(inputs[0]))
    x = (
        torch.randn(8, 5, 12)
        if module is LeapAttention
        else torch.randn(8, 12, 5, 1).to(memory_format=torch.channels_last)
    )
    attention(x)
    q, k, v = recorder.inputs[:3]
    assert q.shape == (2, 3, 4, 5, 4)
    assert len({y.untyped_storage().data_ptr() for y in (q, k, v)}) == 1
    assert all(y.stride(-1) == 1 for y in (q, k, v))
    assert merged[0].data_ptr() == recorder.out.data_ptr()


@pytest.mark.parametrize("training, dropout_p", [(True, 0.3), (False, 0.0)])
def test_dropout_only_in_training(training: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    attention = LeapAttention(12, 3, num_frames=4, leap=2, attn_drop=0.3, proj_drop=1.0).train(training)
    out = attention(torch.randn(4, 5, 12))
    assert recorder.settings["dropout_p"] == dropout_p
    assert (out == 0).all() == training  # proj_drop=1


class TimmAttention(nn.Module):
    """The layers of timm's `Attention`, under its names."""

    def __init__(self, dim: int = 12, num_heads: int = 3, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (norm(dim // num_heads) for _ in range(2))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def test_state_dicts_interchange_with_timm() -> None:
    timm, ours = TimmAttention(), LeapAttention(12, 3, num_frames=4, leap=None, qkv_bias=True)
    assert set(ours.state_dict()) == set(timm.state_dict()) == NAMES
    ours.load_state_dict(timm.state_dict())
    x = torch.randn(8, 5, 12)
    torch.testing.assert_close(ours(x), timm(x))
    timm.load_state_dict(LeapAttention(12, 3, num_frames=2, leap=1, qkv_bias=True).state_dict())


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm])
def test_from_attention_shares_the_layers(norm: type[nn.Module]) -> None:
    timm = TimmAttention(norm=norm).eval()
    timm.scale = 0.3
    ours = LeapAttention.from_attention(timm, num_frames=4, leap=None)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in timm.parameters()}
    assert ours.state_dict().keys() == timm.state_dict().keys()
    assert (ours.scale, ours.training) == (0.3, False)
    ours.scale = None  # as scaled_dot_product_attention has it
    x = torch.randn(8, 5, 12)
    torch.testing.assert_close(ours(x), timm(x))


def test_from_attention_refuses_rotary_positions() -> None:
    class Rotary(TimmAttention):
        def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match=r"^LeapAttention.from_attention: .* only, got Rotary with rope$"):
        LeapAttention.from_attention(Rotary(), num_frames=4, leap=2)


def test_from_attention_refuses_what_it_would_leave_out() -> None:
    biased = TimmAttention()
    biased.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
    biased.register_buffer("relative_position_index", torch.zeros(5, 5), persistent=False)
    with pytest.raises(
        ValueError, match="got TimmAttention with relative_position_bias_table, relative_position_index"
    ):
        LeapAttention.from_attention(biased, num_frames=4, leap=2)
    with pytest.raises(TypeError, match="must have linear layers qkv and proj, got MultiheadAttention"):
        LeapAttention.from_attention(nn.MultiheadAttention(12, 3), num_frames=4, leap=2)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got dim=0"),
        ({"num_heads": 5}, ValueError, "dim must be a multiple of num_heads=5, got dim=12"),
        ({"num_heads": 3.0}, TypeError, "num_heads must be an int, got num_heads=3.0"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got num_frames=0"),
        ({"leap": 0}, ValueError, "leap must be at least 1, got leap=0"),
        ({"fold_div": -1}, ValueError, "fold_div must be at least 0, got fold_div=-1"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got head_dim=0"),
    ],
)
@pytest.mark.parametrize("module", [LeapAttention, LeapAttention2d])
def test_setting_errors(
    module: type[LeapAttention], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{module.__name__}: {message}$"):
        module(**({"dim": 12, "num_heads": 3, "num_frames": 4, "leap": 2} | settings))


def test_input_errors() -> None:
    attention = LeapAttention(12, 3, num_frames=4, leap=2)
    x = torch.randn(6, 5, 12)
    with pytest.raises(ValueError, match=r"^attend_frames: the batch must be a multiple of num_frames=4, got batch=6$"):
        attention(x)
    with pytest.raises(ValueError, match=r"^LeapAttention: attn_mask must be None and is_causal False, got .*True$"):
        attention(x[:4], is_causal=True)
    with pytest.raises(ValueError, match=r"^LeapAttention: attn_mask must be None"):
        attention(x[:4], attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize("shape", [(0, 5, 12), (4, 0, 12)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert LeapAttention(12, 3, num_frames=4, leap=2, fold_div=4)(torch.zeros(shape)).shape == shape


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    attention = LeapAttention(12, 3, num_frames=4, leap=2, fold_div=4, attn_drop=0.1)
    x, target = torch.randn(8, 5, 12), torch.randn(8, 5, 12)
    optimizer = torch.optim.Adam(attention.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(attention(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_autocast() -> None:
    attention = LeapAttention(12, 3, num_frames=4, leap=2, fold_div=4)
    x = torch.randn(8, 5, 12)
    exact = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    out.float().sum().backward()
    assert {p.grad.dtype for p in attention.parameters() if p.grad is not None} == {torch.float32}


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch.compiler.reset()
    attention = LeapAttention(12, 3, num_frames=4, leap=2, fold_div=4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for batch, tokens in ((8, 5), (16, 7), (12, 6), (8, 9)):
        x = torch.randn(batch, tokens, 12)
        out = compiled(x)
        torch.testing.assert_close(out, attention(x))
        gradients = [torch.autograd.grad(y.square().sum(), list(attention.parameters())) for y in (out, attention(x))]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count <= 2
