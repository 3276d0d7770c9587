"""Ranks that disagree, that fail and that die: an error on every other rank within the timeout, and nothing hangs."""

import datetime
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.simulated import run_ranks
from vattn import distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
TIMEOUT = 8.0  # for calls that fail: each rank comes to them in less, however busy the machine is
PAIRS = 3
"""Groups of two processes: in each but the first, a rank leaves in another way."""


def tensors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6 + rank, 4)


def call(rank: int, group: Any, **settings: Any) -> Any:
    """A right call, but for the settings."""
    torch.manual_seed(0)
    query, key = settings.pop("inputs", None) or tensors(rank)
    return distributed.latent_attention(query, key, key, **{"group": group, **settings})


def other_operator(rank: int, group: Any) -> Any:
    x = torch.randn(2, 3, 5, 4)
    if rank:
        return distributed.token_importance(x, x, group=group)
    return distributed.latent_attention(x, x, x, group=group)


def other_order(rank: int, group: Any) -> Any:
    x = torch.randn(2, 3, 4, 5, 4)
    if rank:
        distributed.axial_attention(x, x, x, 0, group=group)
    return distributed.leap_attention(x, x, x, 1, group=group)


def select(rank: int, group: Any) -> Any:
    """Of positions, the second rank has too many."""
    x = torch.randn(2, 2, 4)
    positions = torch.zeros(2 + rank, dtype=torch.int64)
    return distributed.select_tokens(x, x[..., 0], 1, group=group, positions=positions, num_global=0)


def inputs(rank: int, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Those of the second rank are changed."""
    return tuple(change(x) if rank else x for x in tensors(rank))


DISAGREE: dict[str, tuple[Callable[[int, Any], Any], str]] = {
    "latents": (
        lambda rank, group: call(rank, group, inputs=(torch.randn(2, 3, 5 + rank, 4), torch.randn(2, 3, 6, 4))),
        r"distributed.latent_attention: numbers of replicated tokens must .*, got rank 0: \[5\], rank 1: \[6\]",
    ),
    "batch": (
        lambda rank, group: call(rank, group, inputs=inputs(rank, lambda x: x[:1])),
        r"distributed.latent_attention: batch must be the same on every rank, got rank 0: 2, rank 1: 1",
    ),
    "dtype": (
        lambda rank, group: call(rank, group, inputs=inputs(rank, torch.Tensor.double)),
        r"distributed.latent_attention: dtype must be .*, got rank 0: torch.float32, rank 1: torch.float64",
    ),
    "setting": (
        lambda rank, group: call(rank, group, scale=1.0 + rank),
        r"distributed.latent_attention: scale must be the same on every rank, got rank 0: 1.0, rank 1: 2.0",
    ),
    "dropout on one rank": (
        lambda rank, group: call(rank, group, dropout_p=0.5 * rank),
        r"distributed.latent_attention: dropout_p must be the same on every rank, got rank 0: 0.0, rank 1: 0.5",
    ),
    "operator": (
        other_operator,
        r"distributed.\w+: the operator must .*rank 0: distributed.latent_attention, rank 1: distributed.token_im",
    ),
    "order": (
        other_order,
        r"distributed.\w+: the operator must .*rank 0: distributed.leap_attention, rank 1: distributed.axial_at",
    ),
    "positions of one rank": (
        select,
        r"distributed.select_tokens: positions must be those of all tokens \(4\) or of the rank's \(2\), got on rank 1",
    ),
    "gradients of one rank": (
        lambda rank, group: call(rank, group, inputs=[x.requires_grad_(rank == 0) for x in tensors(rank)]),
        r"distributed.latent_attention: requires_grad must be .*, got rank 0: \[True\], rank 1: \[False\]",
    ),
    "lengths": (
        lambda rank, group: call(rank, group, lengths=[6, 7] if rank else [6, 8], dropout_p=0.5),
        r"distributed.latent_attention: lengths must be the same .*, got rank 0: \[\[6, 8\]\], rank 1: \[\[6, 7",
    ),
}
"""Calls of two ranks, and what both say."""

WRONG: dict[str, tuple[Callable[[int, Any], Any], str, str]] = {
    "type": (
        lambda rank, group: call(rank, group, inputs=inputs(rank, torch.Tensor.long)),
        r"TypeError: distributed.latent_attention: query must be float32",
        r"RuntimeError: distributed.latent_attention: the call must be right on every rank, got on rank 1 Type",
    ),
    "value": (
        lambda rank, group: call(rank, group, dropout_p=3.0 * rank),
        r"ValueError: distributed.latent_attention: dropout_p must be between 0 and 1, got dropout_p=3.0",
        r"RuntimeError: distributed.latent_attention: the call must be right on every rank, got on rank 1 Value",
    ),
    "lengths that are not those of one shard": (
        lambda rank, group: call(rank, group, lengths=[6, 9], dropout_p=0.5),
        r"ValueError: distributed.latent_attention: lengths must be those of the shards, got lengths\[1\]=9",
        r"RuntimeError: distributed.latent_attention: the call must be right on every rank, got on rank 1 Value",
    ),
}
"""Calls that are wrong on rank 1: what that says, and what rank 0."""


def raised(function: Callable[[int, Any], Any], rank: int, group: Any) -> str:
    try:
        function(rank, group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagree(rank: int, group: Any) -> dict[str, Any]:
    """What is said of each call, and whether the next one, which is right, gives what the first one gave."""
    found: dict[str, Any] = {}
    whole = call(rank, group)
    known = {"lengths": [6, 7]}
    for name, (function, *_) in (DISAGREE | WRONG).items():
        found[name] = raised(function, rank, group), torch.equal(call(rank, group), whole)
    function = lambda rank, group: call(rank, group, scale=1.0 + rank, **known)  # noqa: E731
    found["lengths are known"] = raised(function, rank, group), torch.equal(call(rank, group, **known), whole)
    found["left out"] = raised(call, rank, dist.GroupMember.NON_GROUP_MEMBER), True
    query, key = (x.requires_grad_() for x in tensors(rank))
    grads = []
    for anomaly in (False, True):
        with torch.autograd.set_detect_anomaly(anomaly):
            out = call(rank, group, inputs=(query, key), **known)
            shifted = distributed.periodic_shift(key[:, :, :, None], 2, group=group)
            grads.append(torch.autograd.grad(out.square().sum() + shifted.square().sum(), (query, key)))
    found["anomaly detection"] = "right", all(map(torch.equal, *grads))
    return found


def leave(rank: int, group: Any, how: str) -> dict[str, Any]:
    """Rank 1 leaves: what rank 0 says of calls afterwards, and how many seconds it takes."""
    query, key = (x.requires_grad_() for x in tensors(rank))
    out = call(rank, group, inputs=(query, key), grad="partial")
    if rank:
        if how == "stays away":
            time.sleep(TIMEOUT + 3)
        os._exit(0)
    began = time.monotonic()
    if how == "dies":
        said = raised(lambda rank, group: out.sum().backward(), rank, group)
    else:
        said = raised(lambda rank, group: call(rank, group), rank, group)
    return {"said": said, "seconds": time.monotonic() - began}


def _run(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2 * PAIRS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    groups = [
        dist.new_group([2 * i, 2 * i + 1], timeout=datetime.timedelta(seconds=TIMEOUT if i else 60))
        for i in range(PAIRS)
    ]
    pair, rank = divmod(process, 2)
    try:
        if pair == 0:
            found: Any = disagree(rank, groups[0])
        else:
            found = leave(rank, groups[pair], ("dies", "stays away")[pair - 1])
    except Exception:
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{process}.pt")
    os._exit(0)  # there is no group any more that could end in order


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder: Path = tmp_path_factory.mktemp("failures")
    torch.multiprocessing.start_processes(_run, (str(folder),), nprocs=2 * PAIRS, start_method="forkserver")
    return {int(path.stem): torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def of_pair(found: dict[int, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for rank in range(2):
        assert isinstance(found[rank], dict), found[rank]
    return found[0], found[1]


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_disagree(found, name):
    for said, usable in (one[name] for one in of_pair(found)):
        assert_says(said, "ValueError: " + DISAGREE[name][1])
        assert usable


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_is_wrong_on_one_rank(found, name):
    _, there, here = WRONG[name]
    for one, expected in zip(of_pair(found), (here, there), strict=True):
        assert_says(one[name][0], expected)
        assert one[name][1]


def test_calls_with_lengths_are_compared_on_a_cpu(found):
    for said, usable in (one["lengths are known"] for one in of_pair(found)):
        assert_says(said, "ValueError: distributed.latent_attention: scale must be the same on every rank")
        assert usable


def test_a_group_of_others(found):
    for rank, one in enumerate(of_pair(found)):
        said = f"ValueError: distributed.latent_attention: this process must be in group, got rank={rank}, which is not"
        assert_says(one["left out"][0], said)


def test_samples_of_vmap_are_refused():
    """They would be stacked while they are on their way."""
    q, x = torch.randn(2, 2, 3, 5, 4), torch.randn(2, 2, 3, 6, 4)
    for name, inputs in (("latent_attention", (q, x, x)), ("token_importance", (q, x))):
        function = getattr(distributed, name)
        with pytest.raises(NotImplementedError, match=f"^distributed.{name}: .*, got torch.func.vmap"):
            run_ranks(2, lambda ranks, f=function, x=inputs: torch.func.vmap(lambda *y: f(*y, group=ranks))(*x))


def test_anomaly_detection(found):
    for _, equal in (one["anomaly detection"] for one in of_pair(found)):
        assert equal


@pytest.mark.parametrize(("process", "says", "least"), [(2, "", 0), (4, ".*[Tt]imed out", TIMEOUT - 1)])
def test_a_rank_that_leaves(found, process, says, least):
    """One that dies between forward and backward, and one that does not come in time."""
    assert isinstance(found[process], dict), found[process]
    assert process + 1 not in found
    assert_says(found[process]["said"], "RuntimeError: " + says)
    assert least <= found[process]["seconds"] <= TIMEOUT + 20


def assert_says(said: str, expected: str) -> None:
    assert re.match(expected, said), said
