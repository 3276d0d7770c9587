"""Dropout of a part of a larger call: its seed comes with the numbers that heads, queries and keys have there."""

import dataclasses
import math

import pytest
import torch

from tests.kernels.attention import SEED, Attention
from tests.kernels.cases import Case
from tests.kernels.checks import (
    assert_right,
    assert_right_jvp,
    assert_same_bits,
    check,
    check_jvp,
    poisoned,
    run,
    run_jvp,
)
from tests.kernels.operators import OPERATORS, over

ATTENTION = [op for op in OPERATORS if isinstance(op, Attention)]


def counts(case: Case) -> tuple[int, int, int]:
    """How many batches and heads, queries and keys there are."""
    B, H, *rows, _ = next(iter(case.tensors.values())).shape
    keys = sum(math.prod(x.shape[2:-1]) for name, x in case.tensors.items() if name.split("[")[0] in ("key", "keys"))
    return B * H, math.prod(rows), keys


def numbered(case: Case, *numbers: torch.Tensor) -> Case:
    """`case` with `numbers` of batches and heads, of queries and of keys behind its seed; random ones without."""
    device = case.settings["seed"].device
    random = (torch.randint(0, 2**40, (count,), device=device) for count in counts(case))
    seed = torch.cat([case.settings["seed"], *(numbers or random)])
    return dataclasses.replace(case, settings=case.settings | {"seed": seed})


@over("cases", ATTENTION)
def test_numbers(operator, sizes, backend):
    case = numbered(operator.make(backend.device, **sizes | {"B": 2, "H": 2}, dropout_p=0.2))
    check(backend, case)
    check_jvp(backend, case)


@over("paths", [op for op in ATTENTION if op.name in ("latent_attention", "edge_sparse_attention")], [pytest.mark.slow])
def test_paths(operator, sizes, backend):
    """Keys in several tensors or on chip, and global tokens."""
    case = numbered(operator.make(backend.device, **{"H": 2, "D": 24, **sizes, **operator.repeatable}, dropout_p=0.2))
    tangents = case.random_tangents()
    with poisoned(backend.device):
        found, of_found = run(backend, case), run_jvp(backend, case, tangents)
    assert_right(case, found)
    assert_right_jvp(case, tangents, of_found)


@over("cases", ATTENTION)
def test_the_usual_numbers(operator, sizes, backend):
    """Those that there are without tables."""
    case = operator.make(backend.device, **sizes | {"B": 2}, **operator.repeatable, dropout_p=0.2)
    usual = numbered(case, *(torch.arange(count, device=backend.device) for count in counts(case)))
    assert_same_bits(run(backend, usual), run(backend, case))


@pytest.mark.parametrize("operator", ATTENTION, ids=lambda op: op.name)
def test_a_part_draws_its_part_of_the_mask(operator, backend):
    """The last head of the last sample, numbered as in the whole call, draws its part of that mask."""
    case, keep_out, keep_value = operator.show_dropout(backend.device, SEED)
    heads, queries, keys = counts(case)
    last = dataclasses.replace(
        case,
        tensors={name: x[-1:, -1:] for name, x in case.tensors.items()},
        grads={name: x[-1:, -1:] for name, x in case.grads.items()},
        settings=case.settings | {name: x[-1:] for name, x in case.settings.items() if name == "kept"},
    )
    numbers = torch.tensor([heads - 1]), torch.arange(queries), torch.arange(keys)
    found = run(backend, numbered(last, *(x.to(backend.device) for x in numbers)))
    assert torch.equal(found["out"] > 0, keep_out[-1:, -1:])
    grads = [grad for name, grad in found.items() if name.startswith("dvalue")]
    assert torch.equal(torch.cat(grads, 2) > 0, keep_value[-1:, -1:])
