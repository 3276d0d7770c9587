"""The nearest code of each vector on the GPU: products in float32 tell which codes may be nearest, float64 decides.

    |x - c|^2 = |x - m|^2 + 2 score(c),   score(c) = |c - m|^2 / 2 - (x - m)(c - m),   m amid the codes

Without m, vectors far from 0 would lose to rounding all that tells their codes apart. A score is off by less than half
a `tolerance`, so that a code whose score is lower by more is nearer; what is closer than that is measured exactly.

A program owns some vectors and reads all codes, a tile after the other. Each lane of a tile remembers the lowest score
that it has met, of which code, and the second lowest score::

    codes   0 .. BLOCK_K | .. 2 BLOCK_K | ..
    lane    0 1 2 3 ..   | 0 1 2 3 ..   | ..      the lanes' lowest are compared once, at the end

Few lanes, mostly one, come within the tolerance of the lowest of all, and their codes are measured. Where the second of
a lane does so too, which is rare, the tiles are read again to measure every such code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import configs, launch
from vattn.kernels.merge_attention import row_offsets

NO_CODE = tl.constexpr(2**31 - 1)
TILES = {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_C": 16, "num_warps": 8, "num_stages": 3}


@triton.jit
def load_vectors(vectors, center_ptr, first_c, C, BLOCK_C: tl.constexpr):
    """Some channels of the vectors without the center, (vectors, channels) in float32."""
    ptrs, step, mask_q = vectors
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_q[:, None] & mask_c[None, :]
    x = tl.load(ptrs[:, None] + offs_c.to(tl.int64)[None, :] * step, mask=mask, other=0.0).to(tl.float32)
    return x - tl.load(center_ptr + offs_c, mask=mask_c, other=0.0)[None, :]


@triton.jit
def tile_scores(
    vectors, centered, first_k, K, C,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (vectors, codes) of a tile of codes, and the codes (1, codes); +inf past the last one."""
    center_ptr, codes_ptr, half_squares_ptr = centered
    code = first_k + tl.arange(0, BLOCK_K)
    mask_k = code < K
    products = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for first_c in range(0, C, BLOCK_C):
        x = load_vectors(vectors, center_ptr, first_c, C, BLOCK_C)  # (vectors, channels)
        offs_c = first_c + tl.arange(0, BLOCK_C)
        ptrs = codes_ptr + code.to(tl.int64)[None, :] * C + offs_c[:, None]
        codes = tl.load(ptrs, mask=mask_k[None, :] & (offs_c < C)[:, None], other=0.0)  # (channels, codes)
        products = tl.dot(x, codes, products, input_precision=PRECISION)
    half_squares = tl.load(half_squares_ptr + code, mask=mask_k, other=float("inf"))
    return half_squares[None, :] - products, code[None, :]


@triton.jit
def measure(vectors, codebook, code, C, BLOCK_C: tl.constexpr):
    """The squared distance of each vector and its `code` (vectors,), in float64."""
    ptrs, step, mask_q = vectors
    codebook_ptr, code_step, code_channel = codebook
    code_ptrs = codebook_ptr + code.to(tl.int64) * code_step
    distance = tl.zeros(code.shape, tl.float64)
    for first_c in range(0, C, BLOCK_C):
        offs_c = (first_c + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask = mask_q[:, None] & (offs_c < C)[None, :]
        x = tl.load(ptrs[:, None] + offs_c[None, :] * step, mask=mask, other=0.0)
        c = tl.load(code_ptrs[:, None] + offs_c[None, :] * code_channel, mask=mask, other=0.0)
        difference = x.to(tl.float64) - c.to(tl.float64)
        distance += tl.sum(difference * difference, 1)
    return distance


@triton.jit
def settle(state, candidates, vectors, codebook, C, BLOCK_C: tl.constexpr):
    """The `state` (distance, code) of each vector after its `candidates` (vectors, lanes), codes or NO_CODE."""
    nearest, index = state
    code = tl.min(candidates, 1)
    while tl.min(code) < NO_CODE:
        there = code < NO_CODE
        distance = measure(vectors, codebook, tl.where(there, code, 0), C, BLOCK_C)
        nearer = there & (distance < nearest)
        nearest = tl.where(nearer, distance, nearest)
        index = tl.where(nearer, code, index)
        candidates = tl.where(candidates == code[:, None], NO_CODE, candidates)
        code = tl.min(candidates, 1)
    return nearest, index


@launch.kernel
def forward_kernel(
    x_ptr, codebook_ptr, center_ptr, codes_ptr, half_squares_ptr, tolerance_ptr, index_ptr,
    sizes, strides, step, code_step, code_channel, rows, K, C,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of vectors. A program writes the codes of BLOCK_Q vectors."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = row < rows
    vectors = x_ptr + row_offsets(row, sizes, strides), step, mask_q
    centered = center_ptr, codes_ptr, half_squares_ptr

    square = tl.zeros((BLOCK_Q,), tl.float32)
    for first_c in range(0, C, BLOCK_C):
        x = load_vectors(vectors, center_ptr, first_c, C, BLOCK_C)
        square += tl.sum(x * x, 1)
    longest = tl.load(tolerance_ptr)
    tolerance = tl.load(tolerance_ptr + 1) * longest * (tl.sqrt(square) + longest)

    lowest = tl.full((BLOCK_Q, BLOCK_K), float("inf"), tl.float32)
    second = tl.full((BLOCK_Q, BLOCK_K), float("inf"), tl.float32)
    codes = tl.full((BLOCK_Q, BLOCK_K), NO_CODE, tl.int32)
    for first_k in range(0, K, BLOCK_K):
        s, code = tile_scores(vectors, centered, first_k, K, C, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
        lower = s < lowest
        second = tl.where(lower, lowest, tl.where(s < second, s, second))
        codes = tl.where(lower, code, codes)
        lowest = tl.where(lower, s, lowest)

    limit = (tl.min(lowest, 1) + tolerance)[:, None]
    candidates = tl.where(lowest <= limit, codes, NO_CODE)
    first = tl.min(candidates, 1)
    state = tl.full((BLOCK_Q,), float("inf"), tl.float64), tl.where(first < NO_CODE, first, 0)
    codebook = codebook_ptr, code_step, code_channel
    # Of codes that are not finite, and of those past the last one, the score is +inf or NaN, and so may the limit be.
    if tl.max((mask_q[:, None] & (second <= limit) & (second < float("inf"))).to(tl.int32)) > 0:
        for first_k in range(0, K, BLOCK_K):
            s, code = tile_scores(vectors, centered, first_k, K, C, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
            within = tl.where((s <= limit) & (s < float("inf")), code, NO_CODE)
            state = settle(state, within, vectors, codebook, C, BLOCK_C)
    elif tl.max(tl.sum((candidates < NO_CODE).to(tl.int32), 1)) > 1:
        state = settle(state, candidates, vectors, codebook, C, BLOCK_C)
    tl.store(index_ptr + row, state[1].to(tl.int64), mask=mask_q)


def forward(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each vector of ``x (..., C)``, int64 and contiguous."""
    index = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if index.numel() == 0:
        return index
    K, C = codebook.shape
    center = codebook.float().nan_to_num(0, 0, 0).mean(0).nan_to_num(0, 0, 0)
    codes = (codebook.float() - center).contiguous()
    half_squares = (codes.double().square().sum(1) / 2).float()
    longest = (2 * half_squares.nan_to_num(0, 0, 0).max()).sqrt()
    # Twice what the sum of C products, each of three in tf32, and the rounding before and behind it may be off.
    unit = torch.finfo(torch.float32).eps * (C + 24)
    tolerance = torch.stack([longest, torch.full_like(longest, unit)])
    sizes, strides = _rows(x)
    tiles = _tiles(x)
    launch.launch(
        forward_kernel, launch.cdiv(index.numel(), tiles["BLOCK_Q"]), x, x, codebook, center, codes, half_squares,
        tolerance, index, launch.pack(sizes), launch.pack(strides), x.stride(-1), *codebook.stride(), index.numel(),
        K, C, PRECISION="ieee" if torch.version.hip is not None else "tf32x3", **tiles,
    )  # fmt: skip
    return index


def _rows(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes of `x` but for its last one, as few as describe where its rows are."""
    sizes, strides = [1], [0]
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if strides[-1] == stride * size or sizes == [1]:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


def _tiles(x: Tensor) -> dict[str, int]:
    if x.device.type != "cpu":
        return TILES
    return configs.INTERPRETER._asdict() | {"BLOCK_C": 32}
