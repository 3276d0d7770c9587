"""Random numbers that a seed alone decides."""

import pytest
import torch

from vattn.models.draws import Draws
from vattn.models.seeded_draws import SeededDraws, draws_in

CPU = torch.device("cpu")


def test_a_seed_decides() -> None:
    first, same, other = (SeededDraws(seed).uniforms(3, 5, device=CPU) for seed in (7, 7, 8))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_numbers_are_the_same_in_every_version() -> None:
    numbers = (SeededDraws(0).uniforms(4, device=CPU) * 2**24).long()
    assert numbers.tolist() == [0, 10361252, 6994312, 14902678]


def test_calls_and_seeds_are_independent() -> None:
    draws = SeededDraws(1)
    rows = [draws.uniforms(10_000, device=CPU) for _ in range(5)]
    rows += [SeededDraws(seed).uniforms(10_000, device=CPU) for seed in range(2, 7)]
    correlations = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.05


@pytest.mark.parametrize("kind", ["exponential", "normal", "uniforms"])
@pytest.mark.parametrize("draws", [SeededDraws(3), Draws(torch.Generator().manual_seed(3))], ids=["seed", "generator"])
def test_distributions(kind: str, draws: Draws) -> None:
    numbers = getattr(draws, kind)(100_000, device=CPU)
    mean, deviation, least = {"exponential": (1, 1, 0), "normal": (0, 1, -9), "uniforms": (0.5, 12**-0.5, 0)}[kind]
    assert numbers.dtype == torch.float32 and bool(numbers.isfinite().all()) and numbers.min() >= least
    assert numbers.mean().item() == pytest.approx(mean, abs=0.02)
    assert numbers.std().item() == pytest.approx(deviation, abs=0.02)


def test_permutations() -> None:
    draws = SeededDraws(0)
    found = draws.permutation(3000, 3, CPU)
    assert torch.equal(found.sort(1).values, torch.arange(3).expand(3000, -1))
    orders = torch.unique(found, dim=0, return_counts=True)[1]
    assert len(orders) == 6 and orders.min() > 400
    assert 0 <= draws.uniform() < 1
    assert draws.uniforms(0, 3, device=CPU).shape == (0, 3)


def test_the_default_dtype_changes_nothing() -> None:
    expected = [SeededDraws(2).exponential(5, device=CPU), SeededDraws(2).normal(5, device=CPU)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [SeededDraws(2).exponential(5, device=CPU), SeededDraws(2).normal(5, device=CPU)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_generator_goes_before() -> None:
    generator = torch.Generator()
    assert draws_in(False, generator).generator is generator
    assert isinstance(draws_in(False, None, 4), SeededDraws)
    assert not isinstance(draws_in(True, None, 4), SeededDraws)
