"""What only merging attention over parts has: parts without keys, and results that lie like the parts."""

import dataclasses

import pytest
import torch

from tests.kernels.checks import assert_same_bits, check, check_jvp, formula, run, run_jvp
from tests.operators.merge_attention import OPERATOR as MERGE
from vattn.kernels.merge_attention import MAX_PARTS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_dtypes_of_counts(count, dtype, backend):
    check(backend, MERGE.make(backend.device, dtype, count=count, N=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_parts_than_one_kernel_takes(dtype, backend):
    check(backend, MERGE.make(backend.device, dtype, count=2 * MAX_PARTS + 3, shape=(3, 7)).gradient_of_out_only())


def test_rows_of_no_channels(backend):
    """They have an lse."""
    case = MERGE.make(backend.device, shape=(3,), D=0)
    found = check(backend, case)
    assert found["out"].shape == (3, 0)
    torch.testing.assert_close(found["lse"], torch.logaddexp(case.tensors["lses[0]"], case.tensors["lses[1]"]))


def test_parts_without_keys(backend):
    """-inf has no weight; where every part is -inf, out is 0, lse -inf, and gradients 0, not NaN."""
    case = MERGE.make(backend.device, count=3, shape=(4, 5)).gradient_of_out_only()
    for i, rows in enumerate((2, 1, 1)):
        case.tensors[f"lses[{i}]"][:rows] = -torch.inf
    found = check(backend, case)
    assert (found.pop("out")[0] == 0).all() and (found.pop("lse")[0] == -torch.inf).all()
    assert all(x.isfinite().all() and (x[0] == 0).all() for x in found.values())


def test_far_apart(backend):
    case = MERGE.make(backend.device, shape=(4,)).gradient_of_out_only()
    far = {f"lses[{i}]": case.tensors[f"lses[{i}]"] + shift for i, shift in enumerate((1000, -1000))}
    check(backend, case.replace(**far))


def test_many_axes_in_any_order(backend):
    """More than the kernels on the CPU have strides for; those of out cannot be merged into fewer."""
    sizes = (2, 1, 2, 1, 1, 3, 1, 2, 1, 2, 1, 8)
    parts = {f"outs[{i}]": torch.randn(sizes, device=backend.device).transpose(0, 9).transpose(2, 7) for i in range(2)}
    case = MERGE.make(backend.device, shape=sizes[:-1], D=8).replace(**parts)
    check(backend, case)
    check_jvp(backend, case)


def test_layouts(backend):
    """Parts that lie alike are read where they lie, others are copied; gradients lie like their parts."""
    B, H, N, D = 2, 3, 5, 16
    device = backend.device
    as_projected = [torch.randn(B, N, H, D, device=device).transpose(1, 2) for _ in range(2)]
    odd = [
        as_projected[0],
        torch.randn(B, H, D, N, device=device).mT,
        torch.randn(B, H, N, 1, device=device).expand(-1, -1, -1, D),
    ]
    one = torch.ones((), device=device)
    for outs in (as_projected, odd):
        parts = {f"outs[{i}]": x for i, x in enumerate(outs)}
        parts |= {f"lses[{i}]": torch.randn(N, B, H, device=device).permute(1, 2, 0) for i in range(len(outs))}
        case = MERGE.make(device, count=len(outs), shape=(B, H, N), D=D).replace(**parts)
        check(backend, dataclasses.replace(case, grads={"out": one.expand(B, H, N, D), "lse": one.expand(B, H, N)}))


def test_tangents_of_parts_without_keys(backend):
    """They have no weight; where every part is -inf, tangents are 0, not NaN."""
    case = MERGE.make(backend.device, count=3, shape=(4, 5))
    for i, rows in enumerate((2, 1, 1)):
        case.tensors[f"lses[{i}]"][:rows] = -torch.inf
    assert all((x[0] == 0).all() for x in check_jvp(backend, case).values())


def test_tangents_of_parts_far_apart(backend):
    case = MERGE.make(backend.device, shape=(4,))
    far = {f"lses[{i}]": case.tensors[f"lses[{i}]"] + shift for i, shift in enumerate((1000, -1000))}
    check_jvp(backend, case.replace(**far))


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_a_part_without_keys_adds_nothing_whatever_it_holds(value, backend):
    """Not even what is not finite: 0 times infinity. It has no gradient, whatever that of the results is."""
    case = MERGE.make(backend.device, count=2, B=1, N=5)
    case.tensors["lses[0]"].fill_(-torch.inf)
    tangents = case.random_tangents()
    expected, expected_tangents = run(backend, case), run_jvp(backend, case, tangents)
    case.tensors["outs[0]"].fill_(value)
    tangents["outs[0]"].fill_(value)
    tangents["lses[0]"].fill_(value)
    assert_same_bits(run(backend, case), expected)
    assert_same_bits(run_jvp(backend, case, tangents), expected_tangents)
    for grad in case.grads.values():
        grad.fill_(value)
    found, (_, truth) = run(backend, case), formula(case, torch.float64)
    for name in ("outs[0]", "lses[0]"):
        assert (found[f"d{name}"] == 0).all() and (truth[f"d{name}"] == 0).all()
    assert not found["douts[1]"].isfinite().any() and not truth["douts[1]"].isfinite().any()
