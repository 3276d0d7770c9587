"""Golden vectors: inputs, weights, outputs and gradients computed by the official code of the published systems.

Every ``.npz`` in ``tests/golden/data`` (or in ``$VATTN_GOLDEN_DIR``) is one test per dtype. Its ``meta``, a JSON
string, has a ``kind``; the function of that name in ``tests/golden/kinds/*.py`` checks the file, given a
:class:`Golden`. A file of a kind without a function fails, and so does a file with an array that its function
never looked at.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
DATA = Path(os.environ.get("VATTN_GOLDEN_DIR") or HERE / "data")
FILES = sorted(DATA.glob("*.npz"))


class Golden:
    """One file of vectors: its settings, its arrays in the dtype under test, and what has not been looked at yet."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.path = path
        self.dtype = dtype
        self.unseen = set(self.arrays)

    def __getitem__(self, name: str) -> Tensor:
        self.unseen.discard(name)
        array = torch.from_numpy(self.arrays[name])
        if array.is_floating_point():
            return array.to(self.dtype)
        return array if array.dtype == torch.bool else array.long()

    def names(self, prefix: str = "") -> list[str]:
        """The names of the arrays under `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.arrays if name.startswith(prefix)]

    def weights(self) -> dict[str, Tensor]:
        """The official state dict."""
        return {name: self[f"w/{name}"] for name in self.names("w/")}

    def equal(self, name: str, actual: Tensor) -> None:
        """The very numbers."""
        self.close(name, actual, atol=0.0)

    def operator(self, name: str, actual: Tensor) -> None:
        """The output of an operator, whose values are about 1: to 1e-9 in float64, to 2e-5 in float32."""
        self.close(name, actual, atol=1e-9 if self.dtype == torch.float64 else 2e-5)

    def gradient(self, name: str, actual: Tensor) -> None:
        """A gradient of an operator: to 1e-5 in float64, as it is stored in float32, or 2e-5 of the largest value."""
        atol, rtol = (1e-7, 1e-5) if self.dtype == torch.float64 else (2e-5, 0.0)
        self.close(name, actual, atol=atol * self._largest(name), rtol=rtol)

    def model(self, run: Callable[["Golden"], dict[str, Tensor]], *, float32_gradients: bool = True) -> None:
        """All outputs and gradients of a whole model, which `run` computes, by name.

        In float64 to 1e-9 of the largest value, gradients to 1e-5. In float32 to 1e-4 of it, unless the model is
        sharper than that: scores in the thousands turn the last bit of a weight into a thousandth of an output,
        in the official code, too. So eight times what a rounding error in every weight does is also allowed.
        """
        sharpness = self._sharpness(run) if self.dtype == torch.float32 else {}
        for name, actual in run(self).items():
            if name not in self.arrays:
                continue
            largest, is_gradient = self._largest(name), "grad/" in name
            if self.dtype == torch.float64:
                atol, rtol = (1e-7 * largest, 1e-5) if is_gradient else (1e-9 * max(largest, 1.0), 0.0)
                self.close(name, actual, atol=atol, rtol=rtol)
            elif is_gradient and not float32_gradients:
                self.unseen.discard(name)
            else:
                self.close(name, actual, atol=max(1e-4 * largest, 8 * sharpness[name]))

    def _sharpness(self, run: Callable[["Golden"], dict[str, Tensor]]) -> dict[str, float]:
        """How far each result moves, computed in float64, when every weight is off by a float32 rounding error."""
        exact = run(Golden(self.path, torch.float64))
        moved = dict.fromkeys(exact, 0.0)
        for seed in range(4):
            noisy, noise = Golden(self.path, torch.float64), np.random.default_rng(seed)
            for name in noisy.names("w/"):
                weight = noisy.arrays[f"w/{name}"]
                if np.issubdtype(weight.dtype, np.floating):
                    noisy.arrays[f"w/{name}"] = weight * (1 + 2.0**-24 * noise.standard_normal(weight.shape))
            for name, result in run(noisy).items():
                moved[name] = max(moved[name], float((result - exact[name]).detach().abs().max()))
        return moved

    def _largest(self, name: str) -> float:
        return float(np.abs(self.arrays[name]).max())

    def close(self, name: str, actual: Tensor, *, atol: float, rtol: float = 0.0) -> None:
        """The numbers to a tolerance that is the file's own."""
        self.unseen.discard(name)
        expected = torch.from_numpy(self.arrays[name]).double()
        torch.testing.assert_close(
            actual.detach().double(), expected, atol=atol, rtol=rtol, msg=lambda message: f"{name}: {message}"
        )


def load_kinds() -> dict[str, Callable[[Golden], None]]:
    """The public functions of ``kinds/*.py``, by name."""
    kinds: dict[str, Callable[[Golden], None]] = {}
    for path in sorted((HERE / "kinds").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_kinds_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, check in vars(module).items():
            if isinstance(check, FunctionType) and check.__module__ == spec.name and not name.startswith("_"):
                kinds[name] = check
    return kinds


KINDS = load_kinds()


def check_file(path: Path, dtype: torch.dtype) -> None:
    golden = Golden(path, dtype)
    kind = golden.meta["kind"]
    if kind not in KINDS:
        pytest.fail(f"{path.name}: no test knows the kind {kind!r}; known are {', '.join(sorted(KINDS))}")
    KINDS[kind](golden)
    assert not golden.unseen, f"{path.name}: arrays that no test looked at: {sorted(golden.unseen)}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path, dtype: torch.dtype) -> None:
    check_file(path, dtype)


def test_there_are_files() -> None:
    assert FILES, f"no .npz in {DATA}"


def test_unknown_kind_fails(tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", meta=json.dumps({"kind": "unheard_of"}))
    with pytest.raises(pytest.fail.Exception, match="no test knows the kind 'unheard_of'"):
        check_file(tmp_path / "new.npz", torch.float64)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"T2_L1/pairs": np.array([[1, 0]])}, "T2_L1/pairs", id="a wrong number"),
        pytest.param({"T2_L1/extra": np.zeros(1)}, "T2_L1/extra", id="an array nobody knows"),
    ],
)
def test_wrong_file_fails(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"T2_L1/pairs": np.array([[0, 1]])} | change
    meta = json.dumps({"kind": "laps_pair_tables", "cases": [[2, 1]]})
    np.savez(tmp_path / "wrong.npz", allow_pickle=False, meta=meta, **arrays)
    with pytest.raises(AssertionError, match=message):
        check_file(tmp_path / "wrong.npz", torch.float64)
