"""The CUDA C++ of token selection: compiled for every architecture, and run on the host, thread by thread.

And what takes its place where it was not compiled.
"""

import ctypes
import itertools
import os
import pathlib
import shutil
import subprocess
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from vattn import reference
from vattn.kernels import select_tokens

ROOT = pathlib.Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")
THREADS, MOST_ROWS = 256, 1024  # csrc/cuda/select_tokens.cuh


class Arguments(ctypes.Structure):
    """SelectTokens of csrc/cuda/select_tokens.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BGNK"),
        ("tokens", ctypes.c_void_p), ("tokens_batch", ctypes.c_int64), ("tokens_step", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("importance", ctypes.c_void_p), ("importance_batch", ctypes.c_int64), ("importance_step", ctypes.c_int64),
        ("positions", ctypes.c_void_p), ("positions_batch", ctypes.c_int64), ("positions_step", ctypes.c_int64),
        ("kept_tokens", ctypes.c_void_p), ("kept_positions", ctypes.c_void_p), ("kept_index", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernel, compiled by a C++ compiler."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX}")
    library = tmp_path_factory.mktemp("cuda") / "select_tokens.so"
    folder = ROOT / "tests/kernels/cuda_on_host"
    command = [CXX, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{folder}"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", folder / "select_tokens.cpp", "-o", library], check=True)
    return ctypes.CDLL(library).select_tokens


def run(kernel, tokens, importance, keep, positions, num_global, rows=512, vector=4, descending=False):
    """What the operator does with the kernel, where a block copies `rows` rows in pieces of `vector` bytes."""
    (B, N), C = importance.shape, tokens.shape[2]
    size = tokens.element_size()
    kept_tokens = torch.full((B, num_global + keep, C), torch.nan, dtype=tokens.dtype)
    kept_positions, kept_index = torch.full((2, B, keep), -1)
    table = torch.zeros(1, 1, dtype=torch.int64) if positions is None else positions.expand(B, N)
    arguments = Arguments(
        B, num_global, N, keep, tokens.data_ptr(), size * tokens.stride(0), size * tokens.stride(1), size * C,
        importance.data_ptr(), *importance.stride(), None if positions is None else table.data_ptr(), *table.stride(),
        kept_tokens.data_ptr(), kept_positions.data_ptr(), kept_index.data_ptr(),
    )  # fmt: skip
    kernel(ctypes.byref(arguments), rows, vector, ctypes.c_bool(descending))
    return kept_tokens, kept_positions, kept_index


def check(kernel, importance, keep, positions=None, num_global=1, C=4, dtype=torch.float32, **settings):
    """Bit by bit what the reference selects."""
    B, N = importance.shape
    tokens = torch.randn(B, num_global + N, C).to(dtype)
    kept_tokens, kept_positions, kept_index = run(kernel, tokens, importance, keep, positions, num_global, **settings)
    expected = reference.select_tokens(tokens, importance, keep, positions=positions, num_global=num_global)
    assert torch.equal(kept_positions, expected[1])
    assert torch.equal(kept_tokens, expected[0])
    assert torch.equal(kept_index, reference.select_tokens(tokens, importance, keep, num_global=num_global)[1])


def test_the_operator_compiles():
    """What hands tensors to the kernel, without CUDA: against the stable ABI of the PyTorch that is installed."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX}")
    includes = [ROOT / "tests/kernels/cuda_on_host", sysconfig.get_path("include"), *cpp_extension.include_paths()]
    command = [CXX, "-std=c++20", "-fsyntax-only", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [flag for path in includes for flag in ("-isystem", str(path))]
    done = subprocess.run([*command, ROOT / "csrc/cuda/operators.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvcc_compiles(architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = ROOT / "csrc/cuda/select_tokens.cu"
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-c", source, "-o", tmp_path / "x.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("0 bytes spill stores") == 3, done.stderr  # one kernel for each vector


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("length", [1, 5, THREADS - 1, THREADS, THREADS + 1, 3 * THREADS + 7])
def test_lengths(length, descending, on_host):
    """Whichever thread comes first."""
    for keep in {0, 1, length // 2, length}:
        check(on_host, torch.rand(2, length), keep, descending=descending)


def test_ties(on_host):
    """The first of equally important tokens stay, also where many threads hold some of them."""
    importance = torch.randint(0, 3, (3, 700)).float()
    importance[1] = 0.5
    for keep in (1, 100, 350, 699):
        check(on_host, importance, keep)


def test_close_numbers(on_host):
    """Numbers that differ in the last digits of their keys only, of both signs."""
    near = torch.tensor([1.0]).view(torch.int32) + torch.randperm(600, dtype=torch.int32)
    importance = near.view(torch.float32) * torch.tensor([[1.0], [-1.0]])
    for keep in (1, 77, 599):
        check(on_host, importance, keep)


def test_infinities_zeros_and_nan(on_host):
    """NaN is more important than infinity, whatever its sign and payload; zeros of both signs are equal."""
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    special = torch.cat([special, torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)])
    for i in range(3):
        importance = special[torch.randperm(12 * 4) % 12].view(1, -1)
        for keep in range(1 + i, 48, 5):
            check(on_host, importance, keep)


@pytest.mark.parametrize("num_global", [0, 1, 3, 40])
@pytest.mark.parametrize("keep", [0, 70, 90])
def test_blocks_of_rows(keep, num_global, on_host):
    """A block has global tokens, others, or both."""
    check(on_host, torch.rand(3, 90), keep, num_global=num_global, rows=32)


def test_the_longest_list_of_a_block(on_host):
    check(on_host, torch.rand(1, 1500), 1400, rows=MOST_ROWS)


@pytest.mark.parametrize(
    ("vector", "C", "dtype"),
    [(16, 8, torch.bfloat16), (16, 260, torch.float32), (4, 3, torch.float32), (2, 5, torch.float16)],
    ids=str,
)
def test_vectors(vector, C, dtype, on_host):
    check(on_host, torch.rand(2, 40), 24, C=C, dtype=dtype, vector=vector)


def test_positions(on_host):
    positions = torch.randint(0, 2**40, (2, 60))
    check(on_host, torch.rand(2, 60), 25, positions)
    check(on_host, torch.rand(2, 60), 25, positions[0])


def test_strides(on_host):
    tokens, importance = torch.randn(31, 3, 10)[..., :8].transpose(0, 1), torch.rand(30, 3).T
    positions = torch.randint(0, 99, (30, 3)).T
    actual = run(on_host, tokens, importance, 12, positions, 1)
    expected = reference.select_tokens(tokens, importance, 12, positions=positions)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [None, "shared", "of samples"])
@pytest.mark.parametrize("num_global", [0, 2])
def test_launcher(num_global, positions, device):
    """What takes the compiled kernel's place; on a GPU the operator too, which has that kernel if it was compiled."""
    tokens, importance = torch.randn(3, num_global + 20, 5, device=device), torch.rand(3, 20, device=device)
    importance[:, 5:9] = importance[:, 3:4]
    if positions is not None:
        positions = torch.randint(0, 99, (20,) if positions == "shared" else (3, 20), device=device)
    forwards = [select_tokens.forward] + [torch.ops.vattn.select_tokens] * tokens.is_cuda
    for forward, keep in itertools.product(forwards, (0, 7, 20)):
        out, kept_positions, index = forward(tokens, importance, keep, positions, num_global)
        settings = {"positions": positions, "num_global": num_global}
        expected = reference.select_tokens(tokens, importance, keep, **settings)
        assert torch.equal(out, expected[0]) and torch.equal(kept_positions, expected[1])
        leaf, grad_out = tokens.clone().requires_grad_(), torch.randn_like(out)
        expected = torch.autograd.grad(reference.select_tokens(leaf, importance, keep, **settings)[0], leaf, grad_out)
        assert torch.equal(select_tokens.backward(grad_out, index, 20, num_global), expected[0])
