"""What the compiler makes of the kernels, without a GPU: in another process, since in this one they are interpreted."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks.assembly import blocks, matrix_loops
from vattn.kernels import configs, latent_attention, launch

ROOT = pathlib.Path(__file__).parents[2]
PASSES = ("forward", "backward_query", "backward_key", "jvp")
KERNELS = {
    "axial_attention": (*PASSES, "backward"),
    "edge_sparse_attention": PASSES,
    "latent_attention": (*PASSES, "decode"),
    "leap_attention": PASSES,
    "node_sparse_attention": PASSES,
    "token_importance": ("lse", "sum"),
}

# The version that the package promises, in full; continuous integration compiles the kernels with it.
OLDEST_TRITON = (ROOT / "pyproject.toml").read_text().partition('"triton>=')[2].partition(";")[0] + ".0"

# Calls the launchers with many lengths, leaps and layouts; prints how often each kernel would have been compiled.
COUNT_COMPILATIONS = """
import collections, json
from unittest import mock
import torch
from benchmarks.kernel_cases import offline, operator_of
from triton.runtime.jit import JITFunction
from vattn.kernels import latent_attention, leap_attention, merge_attention, periodic_shift

keys, calling = collections.defaultdict(set), None
def remember(kernel, key, *ignored):  # and do not compile
    keys[f"{operator_of(kernel, calling)}.{kernel.__name__}"].add(key)

def call(B, H, T, N, D, leap, group_size, projected):
    shape = (B, T, N, 3, H, D) if projected else (3, B, H, T, N, D)
    q, k, v = torch.empty(shape, dtype=torch.bfloat16, device="meta").permute(
        (3, 0, 4, 1, 2, 5) if projected else (0, 1, 2, 3, 4, 5))
    numbered = torch.empty(1 + B * H + 2 * T * N, dtype=torch.int64, device="meta")
    for dropout in ((0.0, None), (0.1, numbered)):
        settings = (leap, group_size, 4, *dropout, 0.1)
        out, lse = leap_attention.forward(q, k, v, *settings)
        leap_attention.backward(out, lse, q, k, v, out, lse, *settings)
        leap_attention.jvp(q, k, v, q, k, v, out, lse, *settings)
    periodic_shift.forward(q, 4, False)
    merge_attention.forward([q, k], [lse, lse])
    merge_attention.backward(out, lse, [q, k], [lse, lse], out, lse)
    merge_attention.jvp([q, k], [lse, lse], [q, k], [lse, lse], out, lse)

def latent(H, D, queries, segments, projected):
    query, *keys = (
        torch.empty((1, n, H, D) if projected else (1, H, n, D), dtype=torch.bfloat16, device="meta")
        for n in (queries, *segments))
    if projected:
        query, *keys = (x.transpose(1, 2) for x in (query, *keys))
    out, lse = latent_attention.forward(query, keys, keys, None, 0.0, None, 0.1)
    latent_attention.backward(out, lse, query, keys, keys, out, lse, None, 0.0, None, 0.1)
    latent_attention.jvp(query, keys, keys, query, keys, keys, out, lse, None, 0.0, None, 0.1)

def launched(function, *args, **settings):
    function.warmup(*args, **settings)

with offline("sm90", launched), mock.patch.object(JITFunction, "_do_compile", remember):
    for D in (72, 128):
        for projected in (False, True):
            for T, leap, group_size in ((1, 1, 1), (2, 1, 2), (7, 3, 2), (16, 4, 2), (16, 1, 16)):
                calling = "leap_attention"
                for N in (1, 2, 15, 16, 17, 32, 197, 784):
                    call(1, 1, T, N, D, leap, group_size, projected)
            call(2, 16, 16, 197, D, 4, 2, projected)
            calling = "latent_attention"
            for H in (1, 16):
                for n in (1, 2, 15, 16, 17, 256, 999, 1024, 2500, 8192, 65535):
                    for queries, segments in ((n, (256,)), (256, (n,)), (1, (n, 0)), (256, (256, n)), (n, (1, 16))):
                        latent(H, D, queries, segments, projected)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


# A main module, since the processes that compile load it again.
FAILING_KERNELS = """
import os, sys
import triton.language as tl
from benchmarks import kernel_cases, kernel_report
from vattn.kernels import launch

@launch.kernel
def sound_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

@launch.kernel
def broken_kernel(x_ptr):
    tl.store(x_ptr, nowhere)

def call(variant, dtype, head_dim):
    x = kernel_cases.empty(1)
    if variant == "last words":
        os._exit(1)
    launch.launch(broken_kernel if variant == "broken" else sound_kernel, 1, x, x, num_warps=1, num_stages=1)

variants = ("sound", "broken", "last words", "sound too")
kernel_cases.OPERATORS["nearest_code"] = kernel_cases.Operator(call, (), variants)
if __name__ == "__main__":
    sys.exit(kernel_report.main(sys.argv[1:]))
"""


def in_another_process(*arguments, status=0):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def report(path, *arguments):
    """The rows that the kernel report stores."""
    in_another_process("-m", "benchmarks.kernel_report", "--json", str(path), *arguments)
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_bounds(row):
    """No wgmma in single file, no spills to speak of, and the matrix instructions of the architecture."""
    assert not row.get("serialized"), row
    if row["operator"] not in KERNELS:
        return
    nvidia = row["architecture"].startswith("sm")
    if row["dtype"] == "float32":
        if nvidia:
            assert row["spilled_bytes"] < 1024 and row["matrix_instructions"], row
        return
    if row["architecture"] == "sm90" and row["head_dim"] <= 128:
        assert row["spilled_bytes"] == 0, row
    if row["architecture"] == "sm90" and row["head_dim"] <= 64 and "dropout" not in row["variant"]:
        assert row["blocks"] >= (2 if row["kernel"] in ("forward", "backward", "backward_key", "decode") else 1), row
    own = row["BLOCK_K" if row["kernel"] in ("backward_key", "sum") else "BLOCK_Q"]
    wide = {"sm90": "wgmma", "sm100": "tcgen05"}.get(row["architecture"])
    if own >= 64 and wide is not None:
        assert set(row["matrix_instructions"]) == {wide}, row
    else:
        assert set(row["matrix_instructions"]) <= {"mma", "mfma"} and row["matrix_instructions"], row


def test_bounds_on_hopper(tmp_path):
    """A head dim of two chunks; the report itself checks the others."""
    rows = report(tmp_path / "report.jsonl", "--architectures", "sm90", "--head-dims", "80", "--operators", *KERNELS)
    compiled = {name: {row["kernel"] for row in rows if row["operator"] == name} for name in KERNELS}
    assert compiled == {name: set(kernels) for name, kernels in KERNELS.items()}
    for row in rows:
        check_bounds(row)
        # No more threads nor registers than there are, and a loop that multiplies unless one tile holds all keys.
        assert row["blocks"] * row["num_warps"] * 32 <= 2048 and row["blocks"] >= 1, row
        assert row["blocks"] * row["num_warps"] * 32 * row["registers"] <= 65536, row
        assert row["loop_instructions"] or row["variant"].startswith("short"), row
    # Blocks of 56 tokens, and the one global token.
    owned = [row["BLOCK_Q"] for row in rows if (row["operator"], row["kernel"]) == ("edge_sparse_attention", "forward")]
    assert owned == [64, 16]


def test_small_kernels_compile(tmp_path):
    """Which the interpreter does not: it lets a variable change its type in a loop."""
    names = ("merge_attention", "nearest_code", "periodic_shift", "position_bias")
    rows = report(tmp_path / "report.jsonl", "--architectures", "sm90", "--operators", *names)
    assert {row["operator"] for row in rows} == set(names)
    assert all(row["spilled_bytes"] == 0 for row in rows if row["dtype"] != "float32")


def test_the_stored_report_is_in_bounds():
    """The lines that are checked in cover every kernel at all tuned head dims, and all architectures."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/kernel_report.jsonl").read_text().splitlines()]
    versions = {row["triton"] for row in rows}
    assert OLDEST_TRITON in versions and len(versions) > 1
    covered = {
        tuple(row[name] for name in ("triton", "architecture", "operator", "kernel", "head_dim")) for row in rows
    }
    small = {row[:3] for row in covered}
    newest = max(versions, key=lambda version: [int(number) for number in version.split(".")])
    places = [*((newest, architecture) for architecture in configs.TABLE), *((version, "sm90") for version in versions)]
    for version, architecture in places:
        for operator, kernels in KERNELS.items():
            for kernel, head_dim in itertools.product(kernels, (64, 72, 80, 96, 120, 128, 144, 256)):
                decoded = kernel != "decode" or head_dim * 2 <= max(configs.DECODE[architecture], default=0)
                assert not decoded or (version, architecture, operator, kernel, head_dim) in covered
        for operator in ("merge_attention", "nearest_code", "periodic_shift", "position_bias"):
            assert (version, architecture, operator) in small
    for row in rows:
        check_bounds(row)


def test_the_oldest_triton_is_what_continuous_integration_compiles_with():
    assert f"make kernels TRITON={OLDEST_TRITON} " in (ROOT / ".ci/run").read_text()


def test_a_kernel_that_fails_hides_no_other(tmp_path):
    """Neither one that does not compile, nor one that takes the compiler's process along."""
    script, stored = tmp_path / "failing.py", tmp_path / "report.jsonl"
    script.write_text(FAILING_KERNELS)
    choice = ("--architectures", "sm90", "--operators", "nearest_code", "--head-dims", "64", "--processes", "2")
    printed = in_another_process(str(script), "--json", str(stored), *choice, status=1)
    assert [json.loads(line)["variant"] for line in stored.read_text().splitlines()] == ["sound", "sound too"]
    table, _, failures = printed.partition("Bounds broken:")
    assert table.count("does not compile") == 2
    assert "nowhere is not defined" in failures and "the compiler ended its process" in failures


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "tensor_memory", "expected"),
    [
        ("sm90", 4, 254, 65536, 0, 2),  # registers
        ("sm90", 4, 168, 0, 0, 3),
        ("sm90", 4, 169, 0, 0, 2),  # a warp gets them by the 256
        ("sm90", 8, 129, 0, 0, 1),
        ("sm90", 1, 168, 0, 0, 12),  # three warps in each quarter
        ("sm90", 4, 32, 0, 0, 16),  # warps
        ("sm90", 1, 16, 0, 0, 32),  # blocks
        ("sm90", 4, 64, 75 * 1024, 0, 3),  # shared memory, of which each block costs 1 KiB more
        ("sm90", 4, 64, 76 * 1024, 0, 2),
        ("sm80", 4, 64, 75 * 1024, 0, 2),
        ("sm100", 4, 64, 0, 256, 2),  # tensor memory
    ],
)
def test_blocks_of_a_multiprocessor(architecture, warps, registers, shared, tensor_memory, expected):
    assert blocks(architecture, warps, registers, shared, tensor_memory) == expected


def test_loops_with_matrix_instructions():
    """The innermost ones: not the loop around two of them, nor one that only loads, nor a way back into a loop."""
    code = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P2 BRA `(.L_x_5) ;
.L_x_6:
        /*0018*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDGSTS [R2], [R4.64] ;
        /*0040*/              @P1  BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/              @P0  BRA `(.L_x_4) ;
        /*0060*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0070*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_4:
        /*0080*/              @P2  BRA `(.L_x_3) ;
        /*0090*/              @P3  BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_5:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R4 ;
        /*00c0*/              @!P2 BRA `(.L_x_5) ;
        /*00d0*/                   BRA `(.L_x_6) ;
"""
    assert matrix_loops(code) == [3, 4]


def test_no_length_compiles_anew():
    """Kernels are compiled for each head dim, and not for lengths, leaps and strides."""
    counts = json.loads(in_another_process("-c", COUNT_COMPILATIONS).splitlines()[-1])
    assert counts == {
        # Without dropout, and with that of numbered heads and tokens.
        "leap_attention.backward_key_kernel": 2 * 2,
        "leap_attention.backward_query_kernel": 2 * 2,
        "leap_attention.forward_kernel": 2 * 2,
        "leap_attention.jvp_kernel": 2 * 2,
        # Latent attention's results and those of its splits, which are float32, and one or two segments of keys.
        "latent_attention.decode_kernel": 2 * 2,
        "latent_attention.backward_key_kernel": 2 * 2,
        "latent_attention.backward_query_kernel": 2 * 2 * 2,
        "latent_attention.forward_kernel": 2 * 2 * 2,
        "latent_attention.jvp_kernel": 2 * 2 * 2,
        "merge_attention.backward_kernel": 2,
        "merge_attention.jvp_kernel": 2,
        "merge_attention.forward_kernel": 2 * (1 + 3),  # and 2, 4 or 8 splits, on the GPU that is not there
        "periodic_shift.shift_kernel": 2,
    }


def test_splits_are_not_said_to_be_aligned_where_they_are_not(monkeypatch):
    """Inputs whose rows are aligned though their head dim is not: partial results of one row follow each other."""
    shapes = []
    monkeypatch.setattr(launch, "launch", lambda *args, SHAPE, **settings: shapes.append(SHAPE))
    for length, alignment in ((4096, 1), (3, 4)):  # with splits, and without
        key = torch.empty(1, 1, length, 12)[..., :9]
        latent_attention.forward(key[:, :, :1], [key], [key], None, 0.0, None, 1.0)
        assert shapes[0].alignment == alignment
        shapes.clear()


def test_the_tiles_of_a_length_are_those_of_any_other():
    """The table is asked about a row's width alone: no entry could depend on a length."""
    names = ("forward", "backward_query", "backward_key")
    kinds = {f"{name}{kind}" for name in (*names, "jvp") for kind in ("", "_group", "_bias")}
    for passes in configs.TABLE.values():
        assert {*names, *(f"{name}_group" for name in names)} <= set(passes) <= kinds
    for passes in configs.FLOAT32.values():
        assert set(passes) == set(names)
    for passes in (*configs.TABLE.values(), *configs.FLOAT32.values()):
        for name, widths in passes.items():
            assert list(widths) == sorted(widths)
            assert max(widths) >= 256 * 4 or name.startswith("jvp") or name.endswith("_bias")
