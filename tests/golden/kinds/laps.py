"""The kinds ``laps_*``: vectors of the official code of LAPS, ViT and Visformer.

Names of cases have their settings in them: ``T8_L2_F4`` is 8 frames, level 2 and fold_div 4,
``plain_qkscale0.3_T8`` the plain-shift code with a scale, and neither leap nor shift.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vattn
from vattn.models.laps import LapsVisformer, LapsViT
from vattn.nn import LeapAttention, LeapAttention2d, leap_of_level


class _Case(NamedTuple):
    code: str
    qk_scale: float | None
    num_frames: int
    level: int | None
    fold_div: int

    @property
    def leap(self) -> int | None:
        return leap_of_level(self.level, self.num_frames)


def _cases(golden: Any) -> dict[str, _Case]:
    """The cases that the file has, by the prefix of their arrays; all that `meta` lists are among them."""
    pattern = r"(?:([A-Za-z]+)_)?(?:qkscale([^_]+)_)?T(\d+)(?:_L(None|\d+))?(?:_F(None|\d+))?"
    cases = {}
    for prefix in sorted({name.split("/")[0] for name in golden.names() if "/" in name} - {"w"}):
        match = re.fullmatch(pattern, prefix)
        assert match, f"{prefix}: not a case of LAPS"
        code, qk_scale, num_frames, level, fold_div = match.groups("None")
        cases[prefix] = _Case(
            code="LAPS" if code == "None" else code,
            qk_scale=golden.meta.get("qk_scale") if qk_scale == "None" else float(qk_scale),
            num_frames=int(num_frames),
            level=None if level == "None" else int(level),
            fold_div=0 if fold_div == "None" else int(fold_div),
        )
    here = {(case.num_frames, case.level, case.fold_div) for case in cases.values()}
    for num_frames, level, *fold_div in golden.meta["cases"]:
        listed = (num_frames, level, (fold_div and fold_div[0]) or 0)
        assert listed in here, f"no arrays of case {listed}"
    return cases


def laps_pair_tables(golden: Any) -> None:
    for prefix, case in _cases(golden).items():
        _check_pairs(golden, prefix, case)


def laps_shift(golden: Any) -> None:
    meta = golden.meta
    x = golden["x"].unflatten(0, (meta["B"], meta["T"])).transpose(1, 2)  # (B, H, T, N, D)
    merged = x.movedim(1, -2).flatten(-2)[:, None]  # (B, 1, T, N, H * D)
    for fold_div in meta["fold_divs"]:
        periodic = vattn.periodic_shift(x, fold_div)
        plain = vattn.periodic_shift(merged, fold_div)[:, 0].unflatten(-1, (meta["heads"], -1)).movedim(-2, 1)
        for name, shifted in (("periodic", periodic), ("plain", plain)):
            golden.equal(f"{name}_F{fold_div}", shifted.transpose(1, 2).flatten(0, 1))


def laps_vit_attention(golden: Any) -> None:
    meta, weights = golden.meta, golden.weights()
    assert ("qkv.bias" in weights) == meta.get("qkv_bias", True)
    for prefix, case in _cases(golden).items():
        attention = LeapAttention(
            meta["dim"], meta["heads"], case.num_frames, case.leap, fold_div=case.fold_div,
            qkv_bias="qkv.bias" in weights, scale=case.qk_scale or None,
        ).to(golden.dtype)  # fmt: skip
        attention.load_state_dict(weights)
        _check_attention(golden, prefix, case, attention)


def laps_visformer_attention(golden: Any) -> None:
    meta, weights = golden.meta, golden.weights()
    head_dim = round(meta["dim"] // meta["heads"] * meta["head_dim_ratio"])
    for prefix, case in _cases(golden).items():
        assert case.code in ("LAPS", "periodic", "plain"), f"{prefix}: no such official code"
        is_plain = case.code == "plain"
        exponent = -0.25 if case.qk_scale is None else case.qk_scale
        attention = LeapAttention2d(
            meta["dim"], meta["heads"], case.num_frames, case.leap, fold_div=0 if is_plain else case.fold_div,
            head_dim=head_dim, qkv_bias="qkv.bias" in weights, proj_bias=False,
            scale=case.qk_scale or None if is_plain else head_dim ** (2 * exponent),
        ).to(golden.dtype)  # fmt: skip
        attention.load_state_dict(weights)
        if is_plain and case.fold_div:
            attention.norm = _PlainShift(case)
        _check_attention(golden, prefix, case, attention)


def laps_vit_model(golden: Any) -> None:
    meta = golden.meta
    blocks = {name: name.replace("block", "blocks.") for name in golden.names() if re.fullmatch(r"block\d+", name)}

    def run(vectors: Any) -> dict[str, Tensor]:
        model = LapsViT.from_official(
            vectors.weights(),
            {
                "NUM_FRAMES": meta["n_seg"], "S2_SKIP_LEVEL": meta["s2_skip_level"], "FOLD_DIV": meta["fold_div"],
                "num_heads": meta["num_heads"], "img_size": meta["img_size"], "qk_scale": meta.get("qk_scale"),
            },
        )  # fmt: skip
        return _results(vectors, model, blocks)

    golden.model(run)


def laps_visformer_model(golden: Any) -> None:
    meta = golden.meta
    features = {f"feat/{name}": name for name in golden.names("feat/")}

    def run(vectors: Any) -> dict[str, Tensor]:
        model = LapsVisformer.from_official(
            vectors.weights(),
            {
                "NUM_FRAMES": meta["T"], "S2_SKIP_LEVEL": meta["s2_skip_level"],
                "S3_SKIP_LEVEL": meta["s3_skip_level"], "FOLD_DIV": meta["fold_div"],
                "num_heads": meta["num_heads"], "qk_scale": meta.get("qk_scale"),
            },
        )  # fmt: skip
        return _results(vectors, model, features)

    # The official weights here make scores of 10**6, of which float32 keeps no digit after the point: a backward
    # that recomputes probabilities from lse, PyTorch's own included, is then off by percents.
    golden.model(run, float32_gradients=False)


class _PlainShift(nn.Module):
    """The shift of the plain-shift code: over merged heads, on maps ``(B*T, C, H, W)``."""

    def __init__(self, case: _Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).unflatten(0, (-1, self.case.num_frames))[:, None]
        shifted = vattn.periodic_shift(tokens, self.case.fold_div)
        return shifted.flatten(0, 2).transpose(1, 2).unflatten(2, x.shape[2:])


def _check_attention(golden: Any, prefix: str, case: _Case, attention: nn.Module) -> None:
    """The output, all stored gradients and all stored tables of one case."""
    x = golden[f"x_T{case.num_frames}"].requires_grad_()
    out = attention(x)
    golden.operator(f"{prefix}/out", out)
    names = ["grad/x", *(f"wgrad/{name}" for name, _ in attention.named_parameters())]
    gradients = torch.autograd.grad(out, [x, *attention.parameters()], golden[f"gout_T{case.num_frames}"])
    for name, gradient in zip(names, gradients, strict=True):
        if name in golden.names(f"{prefix}/"):
            golden.gradient(f"{prefix}/{name}", gradient)
    _check_pairs(golden, prefix, case)


def _check_pairs(golden: Any, prefix: str, case: _Case) -> None:
    """Who meets whom, seen through the operator: with equal scores, frame t gets the mean of its pair's values."""
    frames = case.num_frames
    scores = torch.zeros(1, 1, frames, 1, frames, dtype=golden.dtype)
    frame_numbers = torch.eye(frames, dtype=golden.dtype).view(1, 1, frames, 1, frames)
    out = vattn.leap_attention(scores, scores, frame_numbers, case.leap or frames)
    assert isinstance(out, Tensor)
    early, late = (out[0, 0, :, 0] > 0).triu(1).nonzero().unbind(1)
    two_index = torch.cat([early, late])
    for name, table in {
        "pairs": torch.stack([early, late], 1),
        "two_index": two_index,
        "reverse_index": two_index.argsort(),
    }.items():
        if name in golden.names(f"{prefix}/"):
            golden.equal(f"{prefix}/{name}", table)


def _results(golden: Any, model: LapsViT | LapsVisformer, submodules: dict[str, str]) -> dict[str, Tensor]:
    """Logits, the outputs of `submodules` (stored name to submodule) and gradients, as the files name them."""
    results: dict[str, Tensor] = {}
    for stored, submodule in submodules.items():
        model.get_submodule(submodule).register_forward_hook(
            lambda _module, _inputs, output, stored=stored: results.update({stored: output.detach()})
        )
    x = golden["x"].requires_grad_()
    logits = model.forward_frames(x.unflatten(0, (golden.meta["B"], model.num_frames)))
    per_frame = logits.flatten(0, 1)
    results |= {"logits_per_frame": per_frame.detach(), "logits_video": logits.detach().mean(1)}
    gradients = torch.autograd.grad(per_frame, [x, *model.parameters()], golden["gout"])
    frames = gradients[0]
    results |= {
        "grad/x": frames,
        "grad/x_frame0": frames[0],
        "grad/x_sum_per_frame": frames.sum((1, 2, 3)),
        "grad/x_abs_sum_per_frame": frames.abs().sum((1, 2, 3)),
    }
    names = (name for name, _ in model.named_parameters())
    return results | {f"wgrad/{name}": gradient for name, gradient in zip(names, gradients[1:], strict=True)}
