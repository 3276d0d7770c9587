"""Settings that vectors of FIFO-Diffusion may have, and those in ``tests/golden/data`` have not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden.test_golden import HERE, check_file

TABLE = np.concatenate([np.linspace(1.0, 0.7, 400), np.full(1000, 0.7)])
"""Scales of clean latents in VideoCrafter2, a few too many, as its code has them."""


def arrays_of(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(HERE / "data" / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def check(folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    np.savez(folder / "file.npz", allow_pickle=False, meta=json.dumps(meta), **arrays)
    for dtype in (torch.float64, torch.float32):
        check_file(folder / "file.npz", dtype)


def scaled_sampling(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> np.ndarray:
    """VideoCrafter's sampler, which scales what it predicts of clean latents."""
    times, alphas, alphas_prev = (arrays[f"ddim_{name}"] for name in ("timesteps", "alphas", "alphas_prev"))
    rest = np.sqrt(1 - alphas)
    x = arrays["x_T"].astype(np.float64)
    for noise, i in zip(arrays["noise"], reversed(range(meta["S"])), strict=True):
        common = np.einsum("dc,bcfhw->bdfhw", arrays["A"], x) + arrays["m"] * x.mean(2, keepdims=True)
        common = common + times[i] / 1000 * arrays["b"][:, None, None, None]
        without = common + arrays["uncond"]
        predicted = without + meta["cfg"] * (common + meta["cond"] - without)
        a_prev, sigma = float(alphas_prev[i]), arrays["ddim_sigmas"][i]
        clean = (x - float(rest[i]) * predicted) / float(alphas[i]) ** 0.5 / TABLE[times[i]]
        x = a_prev**0.5 * TABLE[times[max(i - 1, 0)]] * clean + (1 - a_prev - sigma**2) ** 0.5 * predicted
        x = x + sigma * noise
    return x


@pytest.mark.parametrize("known", ["by step", "by timestep", "not at all"])
def test_scaled_clean_latents(known: str, tmp_path: Path) -> None:
    arrays, meta = arrays_of("fifo_base_ddim_57")
    meta["use_scale"] = True
    times = arrays["ddim_timesteps"]
    if known == "by step":
        arrays |= {"ddim_scale_arr": TABLE[times], "ddim_scale_arr_prev": TABLE[[0, *times[:-1]]]}
    elif known == "by timestep":
        arrays["scale_arr"] = TABLE
    with pytest.raises(AssertionError, match="out: "):  # which is not scaled
        check(tmp_path, arrays, meta)
    check(tmp_path, arrays | {"out": scaled_sampling(arrays, meta)}, meta)


@pytest.mark.parametrize("uncond", [[], None], ids=["empty", "missing"])
def test_no_guidance_without_unconditional_conditions(uncond: list | None, tmp_path: Path) -> None:
    arrays, meta = arrays_of("fifo_queue_54")
    assert meta["cfg_scale"] == 1
    meta["cfg_scale"] = 3.0
    with pytest.raises(AssertionError, match="queue_after_denoise: "):
        check(tmp_path, arrays, meta)
    del arrays["uncond"]
    check(tmp_path, arrays if uncond is None else arrays | {"uncond": np.array(uncond)}, meta)
