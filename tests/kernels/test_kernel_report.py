"""What the compiler makes of the kernels, without a GPU: in another process, since in this one they are interpreted."""

import json
import os
import pathlib
import subprocess
import sys

import torch

from vattn.kernels import configs, latent_attention, launch

ROOT = pathlib.Path(__file__).parents[2]
PASSES = ("forward", "backward_query", "backward_key")
KERNELS = {
    "axial_attention": (*PASSES, "backward"),
    "edge_sparse_attention": PASSES,
    "latent_attention": (*PASSES, "decode"),
    "leap_attention": PASSES,
    "token_importance": ("lse", "sum"),
}

# Calls the launchers with many lengths, leaps and layouts; prints how often each kernel would have been compiled.
COUNT_COMPILATIONS = """
import collections, json
import torch
from triton import knobs
from benchmarks import kernel_report
from vattn.kernels import latent_attention, leap_attention, merge_attention, periodic_shift

keys = collections.defaultdict(set)
def remember(key, fn, **ignored):
    keys[f"{fn.module.split('.')[-1]}.{fn.name.split('.')[-1]}"].add(key)
    return True  # and do not compile
knobs.runtime.jit_cache_hook = remember

def call(B, H, T, N, D, leap, group_size, projected):
    shape = (B, T, N, 3, H, D) if projected else (3, B, H, T, N, D)
    q, k, v = torch.empty(shape, dtype=torch.bfloat16, device="meta").permute(
        (3, 0, 4, 1, 2, 5) if projected else (0, 1, 2, 3, 4, 5))
    settings = (leap, group_size, 4, 0.0, None, 0.1)
    out, lse = leap_attention.forward(q, k, v, *settings)
    leap_attention.backward(out, lse, q, k, v, out, lse, *settings)
    periodic_shift.forward(q, 4, False)
    merge_attention.forward([q, k], [lse, lse])
    merge_attention.backward(out, lse, [q, k], [lse, lse], out, lse)

def latent(H, D, queries, segments, projected):
    query, *keys = (
        torch.empty((1, n, H, D) if projected else (1, H, n, D), dtype=torch.bfloat16, device="meta")
        for n in (queries, *segments))
    if projected:
        query, *keys = (x.transpose(1, 2) for x in (query, *keys))
    out, lse = latent_attention.forward(query, keys, keys, None, 0.0, None, 0.1)
    latent_attention.backward(out, lse, query, keys, keys, out, lse, None, 0.0, None, 0.1)

def launched(function, *args, **settings):
    function.warmup(*args, **settings)

with kernel_report.offline("sm90", launched):
    for D in (72, 128):
        for projected in (False, True):
            for T, leap, group_size in ((1, 1, 1), (2, 1, 2), (7, 3, 2), (16, 4, 2), (16, 1, 16)):
                for N in (1, 2, 15, 16, 17, 32, 197, 784):
                    call(1, 1, T, N, D, leap, group_size, projected)
            call(2, 16, 16, 197, D, 4, 2, projected)
            for H in (1, 16):
                for n in (1, 2, 15, 16, 17, 256, 999, 1024, 2500, 8192, 65535):
                    for queries, segments in ((n, (256,)), (256, (n,)), (1, (n, 0)), (256, (256, n)), (n, (1, 16))):
                        latent(H, D, queries, segments, projected)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def in_another_process(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(path, *arguments):
    """The rows that the kernel report stores."""
    in_another_process("benchmarks/kernel_report.py", "--json", str(path), *arguments)
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_bounds(row):
    """No spills, and the wide matrix instructions where a program owns rows enough for one."""
    if row["dtype"] == "float32" or row["operator"] not in KERNELS:
        return
    if row["architecture"] == "sm90" and row["head_dim"] <= 128:
        assert row["spilled_bytes"] == 0, row
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
    """The lines that are checked in cover every kernel on all architectures, at all tuned head dims."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/kernel_report.jsonl").read_text().splitlines()]
    covered = {(row["architecture"], row["operator"], row["kernel"], row["head_dim"]) for row in rows}
    for architecture in configs.TABLE:
        for operator, kernels in KERNELS.items():
            for kernel in kernels:
                for head_dim in (64, 72, 80, 96, 120, 128, 144, 256):
                    decoded = kernel != "decode" or head_dim * 2 <= max(configs.DECODE[architecture], default=0)
                    assert not decoded or (architecture, operator, kernel, head_dim) in covered
        for operator in ("merge_attention", "nearest_code", "periodic_shift", "position_bias"):
            assert any(row["operator"] == operator and row["architecture"] == architecture for row in rows)
    for row in rows:
        check_bounds(row)


def test_no_length_compiles_anew():
    """Kernels are compiled for each head dim, and not for lengths, leaps and strides."""
    counts = json.loads(in_another_process("-c", COUNT_COMPILATIONS).splitlines()[-1])
    assert counts == {
        "leap_attention.backward_key_kernel": 2,
        "leap_attention.backward_query_kernel": 2,
        "leap_attention.forward_kernel": 2,
        # Latent attention's results and those of its splits, which are float32, and one or two segments of keys.
        "latent_attention.decode_kernel": 2 * 2,
        "latent_attention.backward_key_kernel": 2 * 2,
        "latent_attention.backward_query_kernel": 2 * 2 * 2,
        "latent_attention.forward_kernel": 2 * 2 * 2,
        "merge_attention.backward_kernel": 2,
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
    for passes in configs.TABLE.values():
        assert set(passes) == {*names, *(f"{name}_group" for name in names)}
        for widths in passes.values():
            assert list(widths) == sorted(widths) and max(widths) >= 256 * 4
