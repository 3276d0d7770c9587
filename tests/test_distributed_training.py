"""Every model learns on two processes as on one: DDP, FSDP1 and FSDP2, also in mixed precision.

One pair of processes trains all models in all ways, and writes what became of them; the tests look at that.
"""

import copy
import datetime
import functools
import gc
import itertools
import pathlib
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tests.model_losses import LOSSES
from tests.model_zoo import MODELS
from tests.svitt_models import seed
from vattn import BlockLayout, RelativePositionBias3D, edge_sparse_attention
from vattn.models.vqvae import Codebook

STEPS = 2
CPU = torch.device("cpu")
IN_HALVES = {"SViTT"}
"""Their loss is no mean over samples: negatives are those of a process."""


def new_model(name: str) -> nn.Module:
    """In training, except for what makes a sample depend on others or on chance."""
    torch.manual_seed(0)
    entry = MODELS[name]
    model = entry.kind(**entry.settings).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # what is behind it would have no gradient
                parameter.normal_(std=0.05)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, _BatchNorm)):
            module.eval()
        elif isinstance(module, Codebook):
            module.has_begun.fill_(True)
            module.N.fill_(5.0)  # no code is so rare that it goes elsewhere
    return model


def half(batch: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    return tuple(x.chunk(2)[rank] for x in batch)


def with_ddp(model: nn.Module, low: bool) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def with_fsdp1(model: nn.Module, low: bool) -> nn.Module:
    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in listed(model))
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else None
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, mixed_precision=precision, device_id=CPU, use_orig_params=True
    )


def with_fsdp2(model: nn.Module, low: bool) -> nn.Module:
    mesh, modules = init_device_mesh("cpu", (2,)), list(model.modules())
    for module in modules:
        if isinstance(module, _BatchNorm):  # its statistics are float32, and so are its weights
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
    biases = [module for module in modules if isinstance(module, RelativePositionBias3D)]
    for module in [*biases, *listed(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def listed(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: what it has lists of."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists for layer in layers if any(True for _ in layer.parameters())]


WAYS: dict[str, Callable[[nn.Module, bool], nn.Module]] = {
    "DDP": with_ddp, "FSDP1": with_fsdp1, "FSDP2": with_fsdp2,
}  # fmt: skip
DTYPES = {"float32": False, "bfloat16": True}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's state, from wherever it lies."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return copy.deepcopy({name.replace("_fsdp_wrapped_module.", ""): x for name, x in state_of(model).items()})
    full = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state_of(model).items()}
    return copy.deepcopy({name.removeprefix("module."): x for name, x in full.items()})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in itertools.chain(model.named_parameters(), model.named_buffers())}


def train(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], low: bool = False) -> list[float]:
    """Some steps; their losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_all(rank: int, folder: str) -> None:
    """What one of two processes does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for name, way, dtype in itertools.product(LOSSES, WAYS, DTYPES):
        loss_of, batch = LOSSES[name]
        low = DTYPES[dtype]
        try:
            model = WAYS[way](new_model(name), low)
            losses = train(model, lambda m: loss_of(seed(5), m, *half(batch, rank)), low and way == "DDP")  # noqa: B023
            found[f"{name} {way} {dtype}"] = (losses, whole(model))
        except Exception:
            found[f"{name} {way} {dtype}"] = traceback.format_exc()
    found["bias alone"] = sharded_bias()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    gc.collect()  # wrapped models hold process groups, whose threads must end before the process does
    dist.destroy_process_group()


def sharded_bias() -> Any:
    """The gradient of a bias that is all that is sharded."""
    bias = RelativePositionBias3D((1, 4, 4), 2)
    nn.init.normal_(bias.table, generator=seed(3))
    fully_shard(bias, mesh=init_device_mesh("cpu", (2,)))
    try:
        bias_loss(bias).backward()
    except Exception:
        return traceback.format_exc()
    return bias.table.grad.full_tensor()  # type: ignore[union-attr]


def bias_loss(bias: RelativePositionBias3D) -> Tensor:
    query, key, value = torch.randn(3, 1, 2, 17, 4, generator=seed(4))
    layout = BlockLayout.dense(16, 4, num_global=1)
    out: Any = edge_sparse_attention(query, key, value, layout, position_bias=bias)
    return out.sin().sum()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: pathlib.Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(train_all, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def of_both(found: list[dict[str, Any]], case: str) -> tuple[list[float], dict[str, Tensor]]:
    """The mean losses of both processes, and their state, which is the same."""
    for one in found:
        assert not isinstance(one[case], str), one[case]
    (losses, state), (other_losses, other) = (one[case] for one in found)
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    return [(a + b) / 2 for a, b in zip(losses, other_losses, strict=True)], state


@functools.cache
def alone(name: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """What one process makes of the whole batch: the losses, and the state before and after."""
    model, (loss_of, batch) = new_model(name), LOSSES[name]
    before = whole(model)
    parts = [half(batch, 0), half(batch, 1)] if name in IN_HALVES else [batch]
    losses = train(model, lambda m: torch.stack([loss_of(seed(5), m, *part) for part in parts]).mean())
    return losses, before, whole(model)


def test_all_models_are_there() -> None:
    assert set(LOSSES) == set(MODELS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_learn_what_one_does(name: str, way: str, found: list[dict[str, Any]]) -> None:
    losses, state = of_both(found, f"{name} {way} float32")
    expected, before, after = alone(name)
    assert losses == pytest.approx(expected, rel=1e-4)
    moved = 0
    for key, x in after.items():
        step, expected_step = state[key].double() - before[key].double(), x.double() - before[key].double()
        torch.testing.assert_close(
            step,
            expected_step,
            rtol=1e-3,
            atol=1e-3 * expected_step.abs().max().item() + 1e-6,
            msg=lambda m: f"{key}: {m}",  # noqa: B023
        )
        moved += bool(expected_step.abs().max() > 1e-5)
    assert moved > 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision(name: str, way: str, found: list[dict[str, Any]]) -> None:
    losses, state = of_both(found, f"{name} {way} bfloat16")
    expected, before, _ = alone(name)
    assert losses[0] == pytest.approx(expected[0], rel=0.1)
    assert {key: x.dtype for key, x in state.items()} == {key: x.dtype for key, x in before.items()}
    assert all(x.isfinite().all() for x in state.values())
    assert any(not torch.equal(x, before[key]) for key, x in state.items())


def test_a_bias_that_is_sharded_alone(found: list[dict[str, Any]]) -> None:
    bias = RelativePositionBias3D((1, 4, 4), 2)
    nn.init.normal_(bias.table, generator=seed(3))
    bias_loss(bias).backward()
    for one in found:
        assert not isinstance(one["bias alone"], str), one["bias alone"]
        torch.testing.assert_close(one["bias alone"], bias.table.grad)
