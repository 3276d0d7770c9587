"""Models over ranks are the models: outputs, losses, every parameter's gradient, samples, and steps of training."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.processes import Case, Found, World, results, run_cases
from vattn.distributed import parallelize, share_of
from vattn.distributed._ranks import PaperRanks, Ranks
from vattn.models.laps import LapsVisformer, LapsViT, video_from_image
from vattn.models.mebt import MeBT, draft_and_revise, generate, masked_loss, maskgit
from vattn.models.svitt import Sparsity, VideoEncoder, VideoTokens

SIZES = (2, 3, 4)
Pair = tuple[Any, Any]
"""What the ranks found, and what one process finds."""

GRID = (3, 2, 4)
MODES = ("latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_self", "lt2l", "latent_dec")
SPLITS = ((0, 24), (5, 13), (24, 0), (1, 2))
"""Contexts and targets: also none, and fewer than ranks."""


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def mebt(dtype: torch.dtype = torch.float64, **settings: Any) -> MeBT:
    given = {"modes": MODES, "num_latents": 5, **settings}
    return filled(MeBT(11, GRID, dim=16, num_heads=2, **given)).to(dtype)


def filled(model: nn.Module) -> Any:
    """In float64, with weights that are not small, so that every gradient shows."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(std=0.3, generator=seed(i))
    return model.double()


def some_codes(batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, *GRID), generator=seed(3))


def gradients(model: nn.Module, loss: Tensor, group: Any = None) -> dict[str, Tensor]:
    """Of each parameter: over ranks their sum."""
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if group is not None:
            dist.all_reduce(grad, group=group)
        found[name] = grad
    return found


def total(x: Tensor, world: World) -> Tensor:
    """The sum over the ranks."""
    x = x.detach().clone()
    dist.all_reduce(x, group=world.group)
    return x


def mebt_loss(model: MeBT, split: tuple[int, int], group: Any = None) -> tuple[Tensor, Tensor]:
    """The logits and the loss of a fixed partition, of this rank's share."""
    order = torch.stack([torch.randperm(24, generator=seed(i)) for i in range(2)])
    context, target = order[:, : split[0]], order[:, split[0] : sum(split)]
    logits = model(some_codes(), context, target)
    own = range(split[1]) if group is None else share_of(split[1], group)
    codes = some_codes().flatten(1).gather(1, target[:, own.start : own.stop])
    return logits, masked_loss(logits, codes, 20, 24)


def mebt_gradients(world: World, dtype: torch.dtype, splits: Sequence[tuple[int, int]] = SPLITS) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for split in splits:
        one, many = mebt(dtype), parallelize(mebt(dtype), world.group)
        logits, loss = mebt_loss(one, split)
        own_logits, own_loss = mebt_loss(many, split, world.group)
        got, expected = gradients(many, own_loss, world.group), gradients(one, loss)
        found |= {f"{split} gradient of {name}": (got[name], expected[name]) for name in expected}
        found[f"{split} logits"] = world.gather(own_logits, 1), logits.detach()
        found[f"{split} loss"] = total(own_loss, world), loss.detach()
    return found


mebt_float64 = functools.partial(mebt_gradients, dtype=torch.float64)
mebt_float32 = functools.partial(mebt_gradients, dtype=torch.float32, splits=SPLITS[1:2])


def mebt_training(world: World) -> dict[str, Pair]:
    """The loss of training, with partitions that are drawn, and dropout of attention weights."""
    found: dict[str, Pair] = {}
    for number, budget in enumerate((None, 4)):
        one, many = mebt(attn_drop=0.4).train(), parallelize(mebt(attn_drop=0.4), world.group).train()
        losses = []
        for model in (many, one):
            torch.manual_seed(number)
            losses.append(model.training_loss(some_codes(), budget=budget, prior="uniform", label_smoothing=0.1))
        got, expected = gradients(many, losses[0], world.group), gradients(one, losses[1])
        found |= {f"{budget} gradient of {name}": (got[name], expected[name]) for name in expected}
        found[f"{budget} loss"] = total(losses[0], world), losses[1].detach()
    return found


def mebt_samples(world: World) -> dict[str, Pair]:
    one, many = mebt().eval(), parallelize(mebt(), world.group).eval()
    found: dict[str, Pair] = {}
    ways: dict[str, Callable[[MeBT], Any]] = {
        "generate": lambda m: generate(m, 2, num_steps=4, temperature=0.8, top_k=7, generator=seed(1)),
        "maskgit": lambda m: tuple(maskgit(m, some_codes(), num_steps=5, generator=seed(2))),
        "draft and revise": lambda m: tuple(
            draft_and_revise(m, some_codes(), draft_steps=3, top_p=0.9, generator=seed(3))
        ),
    }
    for name, way in ways.items():
        found[name] = way(many), way(one)
    return found


def mebt_refusals(world: World) -> dict[str, Any]:
    """What each rank says where one has other codes, or wrong ones."""
    model, order = parallelize(mebt(), world.group), torch.arange(24).expand(2, -1)
    codes = some_codes()
    said = {}
    for name, given, context in (
        ("codes", (codes + (world.rank == 1)) % 11, order[:, :4]),
        ("context", codes, order[:, : 4 + (world.rank == 1)]),
        ("shape", codes[:, :, : 2 - (world.rank == 1)], order[:, :4]),
    ):
        try:
            model(given, context, order[:, 5:])
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


class SmallAttention(nn.Module):
    """An attention in the manner of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)


class SplitAttention(nn.Module):
    """An attention in the manner of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.scaling, self.attention_dropout = 2, 0.4, 0.3
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))


class ImageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.first, self.second = SmallAttention(), SplitAttention()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).mT
        x = x + self.first(x)
        x = x + self.second(x)[0]
        return self.head(x.mean(1))


def laps_vit() -> Any:
    return filled(
        LapsViT(6, (1, 2, None), 4, image_size=(8, 12), patch_size=4, num_classes=5, embed_dim=16, depth=3, num_heads=2)
    )


def laps_visformer() -> Any:
    size: dict[str, Any] = {
        "image_size": 32,
        "stem_channels": 4,
        "num_classes": 5,
        "embed_dim": 16,
        "depth": (1, 2, 1),
        "num_heads": 2,
    }
    return filled(LapsVisformer(6, ((1, 2), (None,)), **size)).train()


def laps_from_image() -> Any:
    return filled(video_from_image(ImageModel(), num_frames=6, levels=(1, 2))).train()


LAPS: dict[str, Callable[[], Any]] = {
    "LapsViT": laps_vit, "LapsVisformer": laps_visformer, "VideoFromImage": laps_from_image,
}  # fmt: skip


def laps(world: World) -> dict[str, Pair]:
    """Logits, losses, gradients, and the statistics of batch norms, of six frames."""
    found: dict[str, Pair] = {}
    for name, make in LAPS.items():
        side = (32, 32) if name == "LapsVisformer" else (8, 12)
        video, labels = torch.randn(2, 6, 3, *side, dtype=torch.float64, generator=seed(8)), torch.tensor([4, 1])
        own = share_of(6, world.group)
        part = video[:, own.start : own.stop]
        one, many = make(), parallelize(make(), world.group)
        torch.manual_seed(5)
        loss = one.training_loss(video, labels)
        torch.manual_seed(5)
        own_loss = many.training_loss(part, labels)
        got, expected = gradients(many, own_loss, world.group), gradients(one, loss)
        found |= {f"{name} gradient of {weight}": (got[weight], expected[weight]) for weight in expected}
        found[f"{name} loss"] = total(own_loss, world), loss.detach()
        found |= {f"{name} {buffer}": (x, one.get_buffer(buffer)) for buffer, x in many.named_buffers()}
        one.eval(), many.eval()
        found[f"{name} frames"] = world.gather(many.forward_frames(part), 1), one.forward_frames(video).detach()
        found[f"{name} logits"] = many(part).detach(), one(video).detach()
    return found


SPARSITIES = {
    "local and random": Sparsity(block_size=4, num_random=2, keep=1.0),
    "padded with zeros": Sparsity(block_size=5, num_random=1, keep=1.0, pad_keys="zero"),
    "dense": Sparsity(num_random=None, keep=1.0),
    "one block": Sparsity(block_size=100, keep=1.0),
}


def video_encoder(name: str, depth: int = 2) -> Any:
    is_odd = name == "padded with zeros"
    return filled(
        VideoEncoder(
            2, image_size=(16, 16), patch_size=4, dim=16, depth=depth, num_heads=2, mlp_dim=24,
            sparsity=SPARSITIES[name], order="hilbert" if is_odd else "raster", mean_pooling=not is_odd,
        )
    )  # fmt: skip


def encoded(model: Any, size: int) -> tuple[Tensor, VideoTokens]:
    """A rank's part of a loss: of its patches, and of what is the same on every rank."""
    out = model(torch.randn(2, 2, 3, 16, 16, dtype=torch.float64, generator=seed(9)), generator=seed(1))
    same = out.tokens[:, 0].sin().sum() + out.pooled.cos().sum()
    return out.tokens[:, 1:].sin().sum() + same / size, out


def encoders(world: World) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for name in SPARSITIES:
        one, many = video_encoder(name), parallelize(video_encoder(name), world.group)
        (loss, whole), (own_loss, out) = encoded(one, 1), encoded(many, world.size)
        got, expected = gradients(many, own_loss, world.group), gradients(one, loss)
        found |= {f"{name} gradient of {weight}": (got[weight], expected[weight]) for weight in expected}
        found[f"{name} loss"] = total(own_loss, world), loss.detach()
        found[f"{name} pooled"] = out.pooled.detach(), whole.pooled.detach()
        found[f"{name} global token"] = out.tokens[:, 0].detach(), whole.tokens[:, 0].detach()
        found[f"{name} tokens"] = world.gather(out.tokens[:, 1:], 1), whole.tokens[:, 1:].detach()
    return found


def with_ddp(model: Any, mesh: Any) -> nn.Module:
    return DistributedDataParallel(model)


def with_fsdp2(model: Any, mesh: Any) -> nn.Module:
    """Parameters are sharded over the ranks of one video, and copied for other videos."""
    for block in model.transformer.blocks if isinstance(model, MeBT) else model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[Any, Any], nn.Module]] = {"DDP": with_ddp, "FSDP2": with_fsdp2}
Step = Callable[[nn.Module, slice, Any], Tensor]
"""A rank's part of the loss of some videos: a model, which videos, and the mesh over which each of them lies."""


def find_codes(model: nn.Module, videos: slice, mesh: Any) -> Tensor:
    order = torch.randperm(24, generator=seed(6)).expand(4, -1)[videos]
    context, target, codes = order[:, :7], order[:, 7:], some_codes(4)[videos]
    own = share_of(17, mesh)
    logits = model(codes, context, target)
    return masked_loss(logits, codes.flatten(1).gather(1, target[:, own.start : own.stop]), 17, 24)


def classify(model: nn.Module, videos: slice, mesh: Any) -> Tensor:
    video, own = torch.randn(4, 6, 3, 8, 12, dtype=torch.float64, generator=seed(8)), share_of(6, mesh)
    logits = model(video[videos, own.start : own.stop])
    return F.cross_entropy(logits, torch.tensor([4, 1, 0, 2])[videos]) / mesh.size


def encode(model: nn.Module, videos: slice, mesh: Any) -> Tensor:
    video = torch.randn(4, 2, 3, 16, 16, dtype=torch.float64, generator=seed(9))
    return model(video[videos], generator=seed(1)).pooled.sin().mean() / mesh.size


STEPS: dict[str, tuple[Callable[[], Any], Step]] = {
    "MeBT": (mebt, find_codes),
    "LapsViT": (laps_vit, classify),
    "VideoEncoder": (functools.partial(video_encoder, "local and random"), encode),
}


def two_steps(model: nn.Module, loss_of: Step, videos: slice, mesh: Any) -> dict[str, Tensor]:
    """The weights after two steps. DDP and FSDP take means over all ranks, where those of a video make a sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(model, videos, mesh) * mesh.size).backward()
        optimizer.step()
    full = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in model.state_dict().items()}
    return {name.removeprefix("module."): x.detach() for name, x in full.items()}


def data_by_context(world: World) -> dict[str, Pair]:
    """Two pairs of videos at once, the tokens of each over two ranks."""
    found: dict[str, Pair] = {}
    if world.size < 4:
        return found
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    half = slice(0, 2) if mesh["data"].get_local_rank() == 0 else slice(2, 4)
    context = Ranks(mesh["context"].get_group())
    for kind, (make, loss_of) in STEPS.items():
        expected = two_steps(make(), loss_of, slice(None), PaperRanks(0, 1))
        for name, way in WAYS.items():
            got = two_steps(way(parallelize(make(), mesh["context"]), mesh), loss_of, half, context)
            found |= {f"{kind} {name} {weight}": (got[weight], expected[weight]) for weight in expected}
    return found


def meshes(world: World) -> list[str]:
    """What is said of a mesh of two dimensions."""
    if world.size < max(SIZES):
        return []
    mesh, said = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("data", "context")), []
    for call in (lambda: parallelize(mebt(), mesh), lambda: share_of(4, mesh)):
        with pytest.raises(ValueError) as caught:
            call()
        said.append(str(caught.value))
    return said


def logits_of(out: Any) -> Tensor:
    return torch.cat([out.tokens, out.pooled[:, None]], 1) if isinstance(out, VideoTokens) else out


def compiled(world: World) -> dict[str, Pair]:
    """The gradients of steps whose forward and backward are compiled in one piece, and as they are."""
    found: dict[str, Pair] = {}
    if world.size > 2:
        return found
    order, own = torch.arange(24).expand(2, -1), share_of(6, world.group)
    frames = torch.randn(2, 6, 3, 8, 12, dtype=torch.float64, generator=seed(8))[:, own.start : own.stop]
    short = functools.partial(mebt, modes=("latent_enc", "latent_dec", "lt2l", "latent_dec"))
    video = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64, generator=seed(9))
    dense = functools.partial(video_encoder, "dense", depth=1)
    for make, inputs in ((short, (some_codes(), order[:, :9], order[:, 9:])), (laps_vit, (frames,)), (dense, (video,))):
        one, other = (parallelize(make(), world.group) for _ in range(2))
        forward = torch.compile(one, fullgraph=True, backend="aot_eager")
        got = gradients(one, logits_of(forward(*inputs)).sin().sum(), world.group)
        expected = gradients(other, logits_of(other(*inputs)).sin().sum(), world.group)
        found |= {f"gradient of {name}": (got[name], expected[name]) for name in expected}
    return found


class Saved:
    """Bytes that autograd keeps for a backward, but for those of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.bytes = 0

    def pack(self, x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in self.known:
            self.known.add(place)
            self.bytes += x.untyped_storage().nbytes()
        return x


def large_mebt(ranks: Any) -> Callable[[], Tensor]:
    """How to make a loss of a long video, over ranks or on one process."""
    model = MeBT(64, (8, 16, 16), dim=16, num_heads=2, modes=MODES, num_latents=8)
    codes = torch.zeros(1, 8, 16, 16, dtype=torch.int64)
    return of(model, ranks, lambda many: many.training_loss(codes, generator=seed(1)))


def large_vit(ranks: Any) -> Callable[[], Tensor]:
    model = LapsViT(12, (1, 2, 3), image_size=32, patch_size=4, num_classes=5, embed_dim=16, depth=3, num_heads=2)
    own = range(12) if ranks is None else share_of(12, ranks)
    video = torch.zeros(1, 12, 3, 32, 32)[:, own.start : own.stop]
    return of(model, ranks, lambda many: many.training_loss(video, torch.tensor([2])))


def large_encoder(ranks: Any) -> Callable[[], Tensor]:
    size = {"image_size": 32, "patch_size": 4, "dim": 64, "depth": 3, "num_heads": 2, "mlp_dim": 256}
    model = VideoEncoder(12, sparsity=Sparsity(block_size=32, num_local=3, num_random=0, keep=1.0), **size)  # type: ignore[arg-type]
    video = torch.zeros(1, 12, 3, 32, 32)
    return of(model, ranks, lambda many: many(video, generator=seed(1)).pooled.sum())


def of(model: Any, ranks: Any, loss: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    many = model if ranks is None else parallelize(model, ranks)
    return functools.partial(kept_bytes, many, loss)


LARGE = {"MeBT": large_mebt, "LapsViT": large_vit, "VideoEncoder": large_encoder}
MORE = {"MeBT": 1.15, "LapsViT": 1.3, "VideoEncoder": 1.5}
"""Of its share of the memory how much a rank has at most: also latents, frames and blocks of others, and merges."""


def kept_bytes(model: nn.Module, loss: Callable[[Any], Tensor]) -> Tensor:
    """What autograd keeps between forward and backward."""
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        found = loss(model)
    found.backward()
    return torch.tensor(saved.bytes)


def memory(world: World) -> dict[str, float]:
    """The share of what one process keeps that the rank has which keeps most."""
    found = {}
    for name, make in LARGE.items():
        most, alone = make(world.group)(), make(None)()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=world.group)
        found[name] = float(most / alone)
    return found


CASES: dict[str, Case] = {
    "mebt float64": mebt_float64, "mebt float32": mebt_float32, "mebt training": mebt_training,
    "mebt samples": mebt_samples, "mebt refusals": mebt_refusals, "memory": memory,
    "compiled": compiled, "data by context": data_by_context, "meshes": meshes, "laps": laps, "encoders": encoders,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(CASES, tmp_path_factory.mktemp("processes"), SIZES)


ALL_SIZES = ("mebt float64", "mebt float32", "mebt training", "mebt samples", "laps", "encoders")


@pytest.mark.parametrize(("case", "size"), [*itertools.product(ALL_SIZES, SIZES), ("compiled", 2)])
def test_ranks_find_what_one_process_finds(case: str, size: int, found: Found) -> None:
    bound = 1e-10 if "float32" not in case else 2e-5
    for pairs in results(found, case, size):
        assert pairs
        for name, (got, expected) in pairs.items():
            torch.testing.assert_close(got, expected, rtol=bound, atol=bound, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_mesh_of_two_dimensions_is_refused(found: Found) -> None:
    for said in results(found, "meshes", max(SIZES)):
        for op, message in zip(("parallelize", "share_of"), said, strict=True):
            assert message.startswith(f"{op}: mesh must be one-dimensional") and "got mesh.ndim=2" in message


def test_data_parallel_too(found: Found) -> None:
    for pairs in results(found, "data by context", 4):
        assert len(pairs) == sum(len(WAYS) * len(make().state_dict()) for make, _ in STEPS.values())
        for name, (got, expected) in pairs.items():
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_differs_is_told_on_all(size: int, found: Found) -> None:
    for rank, said in enumerate(results(found, "mebt refusals", size)):
        for name in ("codes", "context"):
            assert said[name].startswith(f"ValueError: MeBT: {name} (or its generator) must be the same on every rank")
        kind = "ValueError: MeBT: codes must have shape" if rank == 1 else "RuntimeError: MeBT: the call must be right"
        assert said["shape"].startswith(kind)


@pytest.mark.parametrize("size", SIZES)
def test_memory_falls_with_ranks(size: int, found: Found) -> None:
    for shares in results(found, "memory", size):
        for name, more in MORE.items():
            assert shares[name] < more / size, shares
