"""What only latent attention has: keys in segments, lengths of keys, and splits where there is little to do at once."""

import dataclasses
import mmap

import pytest
import torch
import triton

from tests.kernels.checks import assert_same_bits, check, check_jvp, run, run_jvp
from tests.kernels.sizes import BLOCK_K, DECODE_K, DECODE_Q, LONG, WALK
from tests.operators.latent_attention import OPERATOR as LATENT
from tests.utils import MAP_NORESERVE
from vattn.kernels import configs


@pytest.mark.parametrize(
    "segments",
    [(5, 33), (33, 5), (BLOCK_K, BLOCK_K), (0, 40), (40, 0), (31, 0, 70), (1, 1, 1, 1), (3, 64, 0, 32)],
    ids=str,
)
def test_segments(segments, backend):
    """Keys in several tensors mean what they mean concatenated."""
    check(backend, LATENT.make(backend.device, B=2, H=2, queries=9, keys=segments))


@pytest.mark.parametrize("segments", [(0,), (0, 0)], ids=str)
def test_no_keys(segments, backend):
    found = check(backend, LATENT.make(backend.device, H=2, queries=20, keys=segments))
    assert (found["out"] == 0).all() and (found["lse"] == -torch.inf).all() and (found["dquery"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_key_lengths(dtype, backend):
    lengths = torch.tensor([0, 1, 32, 65, 70], dtype=dtype, device=backend.device)
    check(backend, LATENT.make(backend.device, B=5, H=2, queries=18, keys=[70], key_lengths=lengths))


def test_strided_key_lengths(backend):
    lengths = torch.tensor([[3, 0], [40, 0], [17, 0]], device=backend.device)[:, 0]
    check(backend, LATENT.make(backend.device, B=3, queries=3, keys=[40], key_lengths=lengths))


def test_what_lies_behind_a_key_length_is_not_read(backend):
    lengths = torch.tensor([0, 33, 5], device=backend.device)
    case = LATENT.make(backend.device, B=3, H=2, queries=18, keys=[70], key_lengths=lengths, scale=0.3)
    expected = run(backend, case)
    for b, length in enumerate(lengths.tolist()):
        case.tensors["keys[0]"][b, :, length:] = case.tensors["values[0]"][b, :, length:] = torch.nan
    actual = run(backend, case)
    assert_same_bits(actual, expected)
    for name in ("dkeys[0]", "dvalues[0]"):
        assert all((actual[name][b, :, length:] == 0).all() for b, length in enumerate(lengths.tolist()))


def test_key_lengths_out_of_range(backend):
    """A GPU would have to wait for an error, so the lengths are clamped."""
    wrong, clamped = (torch.tensor(lengths, device=backend.device) for lengths in ([-7, 2**40], [0, 40]))
    case = LATENT.make(backend.device, B=2, queries=3, keys=[40], key_lengths=wrong, scale=0.3)
    if backend.name == "cpp":
        with pytest.raises(ValueError, match=r"key_lengths must be between 0 and the number of keys \(40\)"):
            run(backend, case)
        return
    found = run(backend, case)
    case.settings["key_lengths"] = clamped
    assert_same_bits(found, run(backend, case))


def test_these_lengths_are_split():
    """What the tests of splits mean to test happens in the interpreter."""
    assert configs.splits(1, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 4
    assert configs.splits(2, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 4
    assert configs.splits(8, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 1


@pytest.mark.parametrize("head_dim", [16, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_and_many_keys(dtype, head_dim, backend):
    check(backend, LATENT.make(backend.device, dtype, queries=5, keys=[LONG], D=head_dim))


@pytest.mark.parametrize("segments", [(200, LONG - 200), (7, 0, LONG - 7)], ids=str)
def test_splits_of_segments(segments, backend):
    """Splits that begin in the middle of a segment, and end in another one."""
    check(backend, LATENT.make(backend.device, queries=9, keys=segments))


def test_splits_without_keys(backend):
    """A short sample in a batch with a long one, and one with none: its splits have nothing to read."""
    lengths = torch.tensor([0, 33, LONG], device=backend.device)
    check(backend, LATENT.make(backend.device, B=3, queries=4, keys=[LONG], key_lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_queries_and_few_keys(dtype, backend):
    """The gradients of few keys are sums over splits of the queries."""
    check(backend, LATENT.make(backend.device, dtype, queries=LONG // 2, keys=(5, 3)))


def test_dropout_of_splits(backend):
    check(backend, LATENT.make(backend.device, queries=3, keys=(7, LONG - 7), dropout_p=0.4))


def test_dropout_with_key_lengths(backend):
    lengths = torch.tensor([40, 33], device=backend.device)
    check(backend, LATENT.make(backend.device, B=2, queries=3, keys=[40], key_lengths=lengths, dropout_p=0.4))


def test_dropout_mask_of_one_segment(backend):
    case, keep_out, keep_value = LATENT.show_dropout(backend.device, -1, keys=[40])
    found = run(backend, case)
    assert torch.equal(found["out"] > 0, keep_out)
    assert torch.equal(found["dvalues[0]"] > 0, keep_value)


def test_these_lengths_are_decoded():
    """What the tests of one tile mean to test happens in the interpreter."""
    tiles = {keys: configs.decode_tiles(torch.empty(16), False, keys) for keys in (0, 1, 128, 129, 255, 256, 257)}
    assert [keys for keys, found in tiles.items() if found is not None] == [129, 255, 256]
    assert configs.walk(triton.cdiv(WALK, DECODE_Q), torch.empty(0)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [DECODE_K + i for i in (-DECODE_K // 2, 1 - DECODE_K // 2, -1, 0, 1)])
def test_keys_that_fill_one_tile(keys, dtype, backend):
    check(backend, LATENT.make(backend.device, dtype, queries=9, keys=[keys]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_that_walk_over_queries(dtype, backend):
    check(backend, LATENT.make(backend.device, dtype, queries=WALK, keys=[DECODE_K]))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_dims_of_one_tile(head_dim, backend):
    check(backend, LATENT.make(backend.device, torch.float16, queries=19, keys=[DECODE_K], D=head_dim))


@pytest.mark.parametrize(
    "segments", [(100, 156), (0, 200), (200, 0, 55), (1, 254, 1), (64, 64, 64, 64)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_segments_of_one_tile(segments, dropout_p, backend):
    check(backend, LATENT.make(backend.device, H=2, queries=9, keys=segments, dropout_p=dropout_p))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-4, 5.0])
def test_scale_of_one_tile(scale, backend):
    check(backend, LATENT.make(backend.device, queries=13, keys=[DECODE_K], scale=scale))


@pytest.mark.slow
def test_key_lengths_of_one_tile(backend):
    """Of a sample that reads no keys, too."""
    lengths = torch.tensor([0, 1, 129, 255, 256], device=backend.device)
    sizes = {"B": 5, "H": 2, "queries": DECODE_Q + 1, "keys": [DECODE_K]}
    case = LATENT.make(backend.device, **sizes, key_lengths=lengths)
    found = check(backend, case)
    assert (found["out"][0] == 0).all() and (found["lse"][0] == -torch.inf).all()
    poisoned = case.tensors["values[0]"].clone()
    poisoned[1, :, 1:] = torch.nan
    launchers = backend.launchers(LATENT.name)
    assert torch.equal(LATENT.forward(launchers, case.replace(**{"values[0]": poisoned}))["out"], found["out"])


@pytest.mark.parametrize("segments", [(33, 5), (31, 0, 70), (1, 1, 1, 1), (0, 0), (200, 0, 55)], ids=str)
def test_tangents_of_segments(segments, backend):
    check_jvp(backend, LATENT.make(backend.device, B=2, queries=9, keys=segments))


@pytest.mark.parametrize("keys", [70, DECODE_K, LONG])
def test_tangents_behind_a_key_length_are_not_read(keys, backend):
    """Nor are keys and values; a sample without keys has tangents of 0."""
    lengths = torch.tensor([0, 33, keys], device=backend.device)
    case = LATENT.make(backend.device, B=3, queries=4, keys=[keys], key_lengths=lengths)
    tangents = case.random_tangents()
    expected = check_jvp(backend, case, tangents)
    assert (expected["out"][0] == 0).all() and (expected["lse"][0] == 0).all()
    for b, length in enumerate(lengths.tolist()):
        for name in ("keys[0]", "values[0]"):
            case.tensors[name][b, :, length:] = tangents[name][b, :, length:] = torch.nan
    assert_same_bits(run_jvp(backend, case, tangents), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
def test_rows_far_apart_by_steps_that_are_not(backend):
    """Each step fits 32 bits, but six of them do not; nor do those of the gradient of lse."""
    queries, step = 6, 2**29 - 1
    case = LATENT.make("cpu", queries=queries, keys=(queries,), D=16)
    memory = mmap.mmap(-1, 4 * (queries * step + 2**16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    storage = torch.frombuffer(memory, dtype=torch.float32)

    def far(x, place):
        strides = (0, 0, step, 1)[: x.ndim]
        return storage.as_strided(x.shape, strides, 4096 * place).copy_(x)

    tensors = {name: far(x, i) for i, (name, x) in enumerate(case.tensors.items())}
    grads = {name: far(x, 8 + i) for i, (name, x) in enumerate(case.grads.items())}
    far_case = dataclasses.replace(case, tensors=tensors, grads=grads)
    assert_same_bits(run(backend, far_case), run(backend, case))
    tangents = case.random_tangents()
    far_tangents = {name: far(x, 12 + i) for i, (name, x) in enumerate(tangents.items())}
    assert_same_bits(run_jvp(backend, far_case, far_tangents), run_jvp(backend, case, tangents))


def test_tangents_that_do_not_fit_are_refused(backend):
    """Before a kernel reads past their end."""
    case = LATENT.make(backend.device, queries=3, keys=(4, 5))
    for change in ({"query": torch.zeros(1, 1, 2, 16)}, {"keys[1]": torch.zeros(1, 1, 4, 16)}):
        tangents = case.random_tangents()
        name, x = next(iter(change.items()))
        tangents[name] = x[..., : tangents[name].shape[-1]].to(backend.device)
        with pytest.raises(ValueError, match="must"):
            run_jvp(backend, case, tangents)
    with pytest.raises(TypeError, match="dtype"):
        run_jvp(backend, case, case.random_tangents() | {"query": case.tensors["query"].double()})
