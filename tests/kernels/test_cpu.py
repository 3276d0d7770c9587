"""What is the CPU kernels' own: instruction sets, threads, and how the backward cuts its work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_same_bits, run
from tests.kernels.operators import over
from tests.utils import assert_within_budget
from vattn import _library, reference

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
HERE = Path(__file__).parent


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def other_capabilities() -> list[str]:
    return _library._C.cpu_capabilities()[1:] if _library._C is not None else []


@pytest.mark.slow
@pytest.mark.parametrize("capability", other_capabilities())
def test_other_instruction_sets(capability):
    """The tests of the C++ kernels, for the instruction sets that this processor would not choose."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "cpp",
            "--ignore",
            __file__,
            HERE,
        ],
        env=os.environ | {"VATTN_CPU_CAPABILITY": capability},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


def test_unknown_instruction_set_is_an_error():
    program = "from vattn import _library; _library._C.cpu_capability()"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"VATTN_CPU_CAPABILITY": "avx3"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert (
        "VATTN_CPU_CAPABILITY must be one of" in finished.stderr and "got VATTN_CPU_CAPABILITY=avx3" in finished.stderr
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 3, 150, 24), id="groups for few threads"),
        pytest.param((1, 3, 2, 600, 256), id="groups too large to hold", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_threads(shape, dtype, threads):
    """Few threads take whole groups, many cut them; the forward does not show it in a single bit."""
    torch.manual_seed(0)
    qkv_and_grad = torch.randn(4, *shape).to(dtype)
    settings = (1, 2, 4, 0.0, None, 0.1)

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.to(dtype).detach().requires_grad_() for x in qkv_and_grad[:3])
        out, lse = reference.leap_attention(q, k, v, 1, fold_div=4, scale=0.1, return_lse=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), qkv_and_grad[3].to(dtype))

    truth, plain, first = formula(torch.float64), formula(dtype), None
    for count in (1, 2, 5):
        threads(count)
        q, k, v, grad_out = qkv_and_grad
        out, lse = torch.ops.vattn.leap_attention(q, k, v, *settings)
        grads = torch.ops.vattn.leap_attention_backward(grad_out, None, q, k, v, out, lse, *settings)
        for name, a, t, p in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), truth, plain, strict=True):
            assert_within_budget(a, t, p, name)
        first = first or (out, lse)
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


@over("cases")
def test_bits_do_not_depend_on_threads(operator, sizes, threads):
    """But for those of the gradients of edge-sparse attention, and of few queries of latent attention."""
    case, first = operator.make("cpu", **sizes), None
    for count in (1, 2, 5):
        threads(count)
        found = run(BACKENDS["cpp"], case)
        if operator.name == "edge_sparse_attention":
            found = {name: found[name] for name in operator.results}
        first = first or found
        assert_same_bits(first, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.25, -0.25, 0.0])
def test_scores_that_grow_along_the_keys(scale, dtype):
    """A maximum is soon not the largest any more, by far, and the scale has any sign."""
    torch.manual_seed(0)
    growth = torch.linspace(0, 8, 700).unsqueeze(1)
    inputs = torch.randn(1, 2, 37, 48), torch.randn(1, 2, 700, 48) * growth, torch.randn(1, 2, 700, 48)
    q, k, v = (x.to(dtype) for x in inputs)
    grad_out = torch.randn_like(q)

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        query, *pair = leaves
        out, lse = reference.latent_attention(query, *pair, scale=scale, return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    truth, plain = formula(torch.float64), formula(dtype)
    settings = (None, 0.0, None, scale)
    out, lse = torch.ops.vattn.latent_attention(q, [k], [v], *settings)
    dq, dk, dv = torch.ops.vattn.latent_attention_backward(grad_out, None, q, [k], [v], out, lse, *settings)
    for name, a, t, p in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, dq, *dk, *dv), truth, plain, strict=True):
        assert_within_budget(a, t, p, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_far_beyond_what_their_rounding_tells_apart(dtype):
    """Whatever a score is rounded by, that of the maximum is its own."""
    torch.manual_seed(0)
    times = 1e5 if dtype != torch.float16 else 1e4
    q, k = ((torch.randn(1, 2, 64, 64) * times).to(dtype) for _ in range(2))
    v = torch.randn(1, 2, 64, 64).to(dtype)
    out, lse = torch.ops.vattn.latent_attention(q, [k], [v], None, 0.0, None, 1.0)
    assert lse.isfinite().all() and out.isfinite().all()
    difference = (out.unsqueeze(3) - v.unsqueeze(2)).float().abs().amax(-1)  # nearly all rows are one value's
    assert (difference.amin(-1) < 1e-2).float().mean() > 0.9
