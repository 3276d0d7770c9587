"""Launchers that are replayed: what is done without them is what they do.

Triton's interpreter stands for a kernel that was compiled, so that calls are recorded, and replayed, on the CPU too.
"""

import functools
import gc
import types

import pytest
import torch

from tests.kernels.backends import BACKENDS, Launchers
from tests.kernels.checks import assert_same_bits, run
from tests.kernels.operators import OPERATORS
from vattn._replay import Replayed, note_launch
from vattn.kernels import launch

pytestmark = pytest.mark.gpu


class Interpreted:
    """A kernel as Triton compiles it: of a grid, what takes all arguments in their order."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        names = self.function.arg_names
        return lambda *args: self.function[grid](**dict(zip(names, args, strict=True))) and None


class Replays:
    """The backend with launchers that are replayed from the third call on."""

    name, device = "replays", BACKENDS["triton"].device

    def __init__(self):
        self.calls, self.replayed = 0, {}

    def launchers(self, operator: str) -> Launchers:
        module = BACKENDS["triton"].launchers(operator)
        names = [name for name in ("forward", "backward", "jvp") if hasattr(module, name)]
        return types.SimpleNamespace(**{name: functools.partial(self.call, getattr(module, name)) for name in names})

    def call(self, launcher, *args, **settings):
        def counted(*args):
            self.calls += 1
            return launcher(*args, **settings)

        return self.replayed.setdefault(launcher, Replayed(counted, lambda *args: None))(*args)


@pytest.fixture
def replaying(monkeypatch):
    def launch_first(function, programs, *args, **settings):
        first(function, programs, *args, **settings)
        return Interpreted(function)

    first = launch.launch_first
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "launch_first", launch_first)
        monkeypatch.setattr(launch, "_launched", {})
    return Replays()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda op: op.name)
def test_the_same_bits(operator, replaying):
    sizes = next(iter(operator.cases.values()))
    first, second, third = (operator.make(replaying.device, **sizes) for _ in range(3))
    run(replaying, first)
    run(replaying, second)
    launched = replaying.calls
    replaying.calls = 0
    found = run(replaying, third)
    assert launched > 0 == replaying.calls
    assert_same_bits(found, run(BACKENDS["triton"], third))


@pytest.mark.parametrize("same", [False, True], ids=["others", "one tensor"])
def test_tensors_that_were_one(same, replaying):
    """What is given twice in the call that is recorded may be two tensors in the next, and the other way round."""
    launchers = replaying.launchers("leap_attention")
    x, y, z = torch.randn(3, 1, 1, 1, 3, 16, device=replaying.device)
    given = [(x, x, x), (x, x, x), (x, y, z)] if same else [(x, y, z), (x, y, z), (x, x, x)]
    settings = 1, 1, 0, 0.0, None, 0.25
    for tensors in given:
        out, _ = launchers.forward(*tensors, *settings)
    assert torch.equal(out, BACKENDS["triton"].launchers("leap_attention").forward(*given[-1], *settings)[0])


def test_what_is_kept_between_calls_is_not_replayed():
    kept = torch.ones(3)
    replayed = Replayed(lambda x: x + kept, lambda *args: None)
    for value in (1.0, 2.0, 3.0):
        kept.fill_(value)
        assert torch.equal(replayed(torch.zeros(3)), kept)


def test_what_depends_on_values_is_not_replayed():
    def launcher(x):
        return torch.empty(x.nonzero().shape[0])

    replayed = Replayed(launcher, lambda *args: None)
    for values in ([1.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
        x = torch.tensor(values)
        assert replayed(x).shape == launcher(x).shape


def test_a_recording_keeps_no_tensor_alive():
    def launcher(x, others):
        out = torch.empty_strided(x.shape, x.stride())
        note_launch(lambda *args: None, [x, out, tuple(others), 3])
        return out, x + others[0]

    replayed = Replayed(launcher, lambda *args: None)
    for _ in range(3):
        tensors = [torch.randn(4), torch.randn(4)]
        tensors += replayed(tensors[0], tensors[1:])
        storages = [x.untyped_storage()._weak_ref() for x in tensors]
        tensors.clear()
        gc.collect()
        assert all(map(torch.UntypedStorage._expired, storages))


def test_a_recording_inside_of_another():
    inner = Replayed(lambda x: x + 1, lambda *args: None)
    outer = Replayed(lambda x: inner(x) * 2, lambda *args: None)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert outer(torch.tensor([value])).item() == 2 * (value + 1)
