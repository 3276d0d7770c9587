"""Codebooks: the precision of their statistics, vectors that are not finite or not there, activation checkpointing."""

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vattn.models.draws import Draws
from vattn.models.vqvae import VQGAN, VQVAE, Codebook

LOW = [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16")]
STATISTICS = ("embeddings", "N", "z_avg")


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def dtypes(codebook: Codebook) -> set[torch.dtype]:
    return {codebook.get_buffer(name).dtype for name in STATISTICS}


def small_vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(num_codes=12, code_dim=4, hidden=4, num_blocks=1, downsample=(2, 4, 4))


def small_vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(num_codes=12, code_dim=4, hidden=4, downsample=(2, 4, 4), groups=2)


class TestPrecision:
    """Statistics are float32 at least; what comes out has the dtype of what went in."""

    @pytest.mark.parametrize("dtype", LOW)
    def test_a_code_follows(self, dtype: torch.dtype) -> None:
        codebook = Codebook(1, 1).to(dtype)
        codebook(torch.full((1, 1, 1), 4.0, dtype=dtype))
        for _ in range(1000):
            codebook(torch.full((1, 1, 1), 5.0, dtype=dtype))
        assert codebook.embeddings.item() == pytest.approx(5.0, abs=1e-3)

    def test_large_sums(self) -> None:
        codebook = Codebook(1, 1).half()
        for _ in range(3):
            codebook(torch.full((1, 1, 65536), 60000.0, dtype=torch.float16))
        assert codebook.embeddings.item() == pytest.approx(60000.0, rel=1e-5)
        assert codebook.N.item() == pytest.approx(0.99**3 + 65536 * (1 - 0.99**3), rel=1e-5)

    @pytest.mark.parametrize(
        "cast",
        [
            lambda module: module.bfloat16(),
            lambda module: module.half(),
            lambda module: module.to(torch.bfloat16),
            lambda module: module.to(device="cpu", dtype=torch.float16),
            lambda module: module.double().half(),
            lambda module: module.type(torch.bfloat16),
            lambda module: module.bfloat16().to("meta").to_empty(device="cpu"),
        ],
        ids=["bfloat16", "half", "to dtype", "to device and dtype", "double, then half", "type", "to_empty"],
    )
    def test_casts(self, cast: Callable[[Any], Any]) -> None:
        codebook = Codebook(5, 3)
        before = codebook.embeddings.clone()
        cast(torch.nn.Sequential(codebook))
        assert dtypes(codebook) == {torch.float32}
        assert codebook.embeddings.shape == before.shape
        codebook = Codebook(5, 3).bfloat16()
        assert dtypes(codebook) == {torch.float32} and dtypes(codebook.double()) == {torch.float64}

    def test_a_cast_keeps_values(self) -> None:
        codebook = Codebook(5, 3)
        before = copy.deepcopy(codebook.state_dict())
        assert all(map(torch.equal, codebook.bfloat16().state_dict().values(), before.values()))

    @pytest.mark.parametrize("assign", [False, True])
    def test_checkpoints_of_either_kind(self, assign: bool) -> None:
        source, z = Codebook(5, 3), torch.randn(1, 3, 40)
        source(z, generator=seed())
        for low in (False, True):
            state = {n: x.bfloat16() if low and n in STATISTICS else x for n, x in source.state_dict().items()}
            for codebook in (Codebook(5, 3), Codebook(5, 3).bfloat16()):
                codebook.load_state_dict(copy.deepcopy(state), assign=assign)
                assert dtypes(codebook) == {torch.float32}
                assert torch.equal(codebook.N, state["N"].float())

    @pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_official_and_saved_models(self, saved: torch.dtype, tmp_path: Path) -> None:
        tokenizer, video = small_vqvae(), torch.rand(1, 3, 4, 16, 16) - 0.5
        tokenizer(video)
        weights = {name: x.to(saved) if x.is_floating_point() else x for name, x in tokenizer.state_dict().items()}
        loaded = VQVAE.from_official(weights, downsample=(2, 4, 4))
        assert dtypes(loaded.codebook) == {torch.float32}
        loaded.save_pretrained(tmp_path)
        again = VQVAE.from_pretrained(tmp_path)
        assert dtypes(again.codebook) == {torch.float32} and next(again.encoder.parameters()).dtype == saved
        reconstruction, quantized = again(video.to(saved))
        assert reconstruction.dtype == quantized.embeddings.dtype == saved
        assert again.decode(quantized.codes).dtype == saved

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("module", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_what_comes_out(self, dtype: torch.dtype, module: torch.dtype, autocast: bool) -> None:
        z = torch.randn(2, 4, 10, generator=seed()).to(dtype).requires_grad_()
        for codebook in (Codebook(8, 4).to(module).eval(), Codebook(8, 4).to(module)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                quantized = codebook(z)
            assert {x.dtype for x in (quantized.embeddings, quantized.commitment_loss, quantized.perplexity)} == {dtype}
            (gradient,) = torch.autograd.grad(quantized.embeddings.sum() + quantized.commitment_loss, z)
            assert gradient.dtype == dtype

    def test_distances_are_those_of_float32(self) -> None:
        codebook, z = Codebook(500, 3).bfloat16().eval(), torch.randn(1, 3, 300).bfloat16()
        codebook.embeddings.copy_(1 + 0.001 * torch.randn(500, 3))  # which bfloat16 does not tell apart
        distances = (z[0].T.double()[:, None] - codebook.embeddings.double()).square().sum(2)
        found = distances.gather(1, codebook(z).codes[0][:, None])[:, 0]
        torch.testing.assert_close(found, distances.amin(1), rtol=0.0, atol=1e-5)

    def test_a_wrapper_that_casts_buffers(self) -> None:
        codebook = Codebook(1, 1)
        for buffer in codebook.buffers():  # as wrappers for mixed precision do
            if buffer.is_floating_point():
                buffer.data = buffer.to(torch.bfloat16)
        codebook(torch.full((1, 1, 1), 4.0))
        for _ in range(1000):
            codebook(torch.full((1, 1, 1), 5.0))
        assert dtypes(codebook) == {torch.float32} and codebook.embeddings.item() == pytest.approx(5.0, abs=1e-3)

    @pytest.mark.parametrize("small_tokenizer", [small_vqvae, small_vqgan], ids=["VQVAE", "VQGAN"])
    @pytest.mark.parametrize("dtype", LOW)
    def test_tokenizers_train(self, small_tokenizer: Any, dtype: torch.dtype) -> None:
        tokenizer = small_tokenizer().to(dtype)
        loss = tokenizer.training_loss((torch.rand(2, 3, 4, 16, 16) - 0.5).to(dtype))
        loss.backward()
        assert loss.dtype == dtype and dtypes(tokenizer.codebook) == {torch.float32}
        assert all(bool(parameter.grad.isfinite().all()) for parameter in tokenizer.parameters())

    def test_default_dtypes(self) -> None:
        for default, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                assert dtypes(Codebook(3, 2)) == {expected}
            finally:
                torch.set_default_dtype(before)


BAD = [
    pytest.param(torch.nan, id="NaN"),
    pytest.param(torch.inf, id="infinity"),
    pytest.param(-torch.inf, id="-infinity"),
    pytest.param(3e38, id="squares beyond float32"),
]


class TestNotFinite:
    """Vectors that are not finite leave no trace."""

    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("num_vectors", [5, 40], ids=["fewer vectors than codes", "more"])
    def test_they_are_as_if_not_there(self, value: float, num_vectors: int) -> None:
        codebook, expected = Codebook(10, 3), Codebook(10, 3)
        expected.load_state_dict(codebook.state_dict())
        generators = [seed(), seed()]
        for step in range(3):
            good = torch.randn(1, 3, num_vectors, generator=seed(step))
            bad = torch.randn(1, 3, 4, generator=seed(10 + step))
            bad[0, torch.arange(4) % 3, torch.arange(4)] = value
            places = torch.randperm(num_vectors + 4, generator=seed(step)).argsort()[:num_vectors].sort().values
            z = torch.empty(1, 3, num_vectors + 4)
            z[:, :, places] = good
            outside = torch.ones(num_vectors + 4, dtype=torch.bool).index_fill(0, places, False)
            z[:, :, outside] = bad
            found, wanted = codebook(z, generator=generators[0]), expected(good, generator=generators[1])
            assert torch.equal(found.codes[:, places], wanted.codes)
            assert torch.equal(found.perplexity, wanted.perplexity)
            assert codebook.left_out == 4 and expected.left_out == 0
            assert not found.commitment_loss.isfinite()  # nothing hides it
            assert found.codes.min() >= 0 and found.codes.max() < 10
        assert all(map(torch.equal, codebook.state_dict().values(), expected.state_dict().values()))

    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("has_begun", [False, True])
    def test_nothing_but_them(self, value: float, has_begun: bool) -> None:
        codebook = Codebook(10, 3)
        if has_begun:
            codebook(torch.randn(1, 3, 20))
        before = copy.deepcopy(codebook.state_dict())
        quantized = codebook(torch.full((2, 3, 4), value))
        assert codebook.left_out == 8 and quantized.perplexity == 0
        assert all(map(torch.equal, codebook.state_dict().values(), before.values()))
        codebook(torch.randn(1, 3, 20))
        assert codebook.has_begun and all(bool(x.isfinite().all()) for x in codebook.buffers())

    def test_checkpoints_have_no_more_names(self) -> None:
        codebook = Codebook(10, 3)
        codebook(torch.full((1, 3, 4), torch.nan))
        assert list(codebook.state_dict()) == ["embeddings", "N", "z_avg", "has_begun"]


class TestEmpty:
    """No vectors, no change."""

    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3)])
    @pytest.mark.parametrize("training", [False, True])
    def test_nothing(self, shape: tuple[int, ...], training: bool) -> None:
        codebook = Codebook(10, 3).train(training)
        before = copy.deepcopy(codebook.state_dict())
        z = torch.zeros(shape, requires_grad=True)
        quantized = codebook(z)
        assert quantized.embeddings.shape == shape and quantized.codes.shape == shape[:1] + shape[2:]
        assert quantized.commitment_loss == 0 and quantized.perplexity == 0
        (quantized.embeddings.sum() + quantized.commitment_loss).backward()
        assert z.grad is not None and z.grad.shape == shape
        assert all(map(torch.equal, codebook.state_dict().values(), before.values()))


def steps(part: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What codebooks hold and say after steps in training, some vectors of which are not finite."""
    found: list[Tensor] = []
    for num_codes in (6, 50):  # fewer than vectors, and more
        codebook, generator = Codebook(num_codes, 2).double(), seed()
        for step in range(3):
            z = torch.randn(4, 2, 10, generator=seed(step), dtype=torch.float64)
            z[1, 0, 3], z[2, 1, 4], z[3, 0, :2] = torch.nan, torch.inf, -torch.inf
            found.append(codebook(part(z), generator=generator).perplexity)
            assert codebook.left_out is not None
            found.append(codebook.left_out)
        found += codebook.buffers()
    return found


def first_is_empty(z: Tensor, rank: int) -> Tensor:
    return z[:0] if rank == 0 else z


def second_is_empty(z: Tensor, rank: int) -> Tensor:
    return z[:0] if rank == 1 else z


def uneven(z: Tensor, rank: int) -> Tensor:
    return z[:1] if rank == 0 else z[1:]


def first_is_not_finite(z: Tensor, rank: int) -> Tensor:
    return torch.full_like(z, torch.nan) if rank == 0 else z


PARTS = {part.__name__: part for part in (first_is_empty, second_is_empty, uneven, first_is_not_finite)}
"""What each of two processes is given of a step."""


def low_precision(model: torch.nn.Module, wrapper: str) -> torch.nn.Module:
    """A model that computes in bfloat16, sharded over the processes; FSDP casts buffers, too."""
    if wrapper == "FSDP":
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True,
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16),
        )  # fmt: skip
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return model


def train_in_mixed_precision(rank: int) -> None:
    """Statistics stay float32, and are those of all processes."""
    for small_tokenizer, wrapper in itertools.product((small_vqvae, small_vqgan), ("FSDP", "fully_shard")):
        tokenizer = small_tokenizer()
        model = low_precision(tokenizer, wrapper)
        for step in range(3):
            video = torch.rand(2, 3, 4, 16, 16, generator=seed(2 * step + rank)) - 0.5
            reconstruction, quantized = model(video, seed(step))
            (reconstruction.float().sum() + quantized.commitment_loss).backward()
        assert dtypes(tokenizer.codebook) == {torch.float32}
        vectors = 0.99**3 * 12 + 0.01 * (0.99**2 + 0.99 + 1) * 128
        assert tokenizer.codebook.N.sum().item() == pytest.approx(vectors, rel=1e-5)
        for name in STATISTICS:
            mine = tokenizer.codebook.get_buffer(name)
            first = mine.clone()
            dist.broadcast(first, 0)
            assert torch.equal(mine, first)


def train_where_one_has_begun(rank: int) -> None:
    """It raises in both processes, of which none waits for the other."""
    codebook = Codebook(4, 2)
    codebook.has_begun.fill_(rank == 0)
    with pytest.raises(RuntimeError, match=r"^Codebook: has_begun must be the same in all processes, got True in 1 of"):
        codebook(torch.randn(1, 2, 9))


def train_with_ddp(rank: int, folder: Path) -> None:
    """The second process has nothing in the second step."""
    for small_tokenizer in (small_vqvae, small_vqgan):
        model = torch.nn.parallel.DistributedDataParallel(small_tokenizer())
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for step in range(3):
            video = torch.rand(2, 3, 4, 16, 16, generator=seed(2 * step + rank)) - 0.5
            video = video[:0] if rank == step == 1 else video
            reconstruction, quantized = model(video, seed(step))
            loss = model.module.reconstruction_loss(reconstruction, video) + quantized.commitment_loss
            assert loss == 0 if video.numel() == 0 else loss > 0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(bool(x.isfinite().all()) for x in model.module.state_dict().values())
        torch.save(dict(model.module.named_parameters()), folder / f"{type(model.module).__name__}{rank}.pt")


def run_process(rank: int, folder: Path) -> None:
    """All that one of two processes does: tests look at the files."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, part in PARTS.items():
        torch.save(steps(partial(part, rank=rank)), folder / f"{name}{rank}.pt")
    train_where_one_has_begun(rank)
    train_with_ddp(rank, folder)
    train_in_mixed_precision(rank)
    dist.barrier()
    gc.collect()  # wrapped models hold process groups, whose threads must end before the process does
    dist.destroy_process_group()


class TestProcesses:
    """Two of them, which are started once."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder: Path = tmp_path_factory.mktemp("processes")
        torch.multiprocessing.spawn(run_process, (folder,), nprocs=2)
        return folder

    @pytest.mark.parametrize("name", PARTS)
    def test_share_a_codebook(self, name: str, folder: Path) -> None:
        expected = steps(lambda z: z)
        for rank in range(2):
            actual = torch.load(folder / f"{name}{rank}.pt", weights_only=True)
            if name == "first_is_not_finite":  # of which there are more
                actual, expected = ([x for x in these if x.is_floating_point()] for these in (actual, expected))
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=False)

    def test_weights_are_the_same_without_a_batch(self, folder: Path) -> None:
        for name in ("VQVAE", "VQGAN"):
            one, other = (torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
            assert all(torch.equal(one[weight], other[weight]) for weight in one)


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "without reentrance": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(
            create_selective_checkpoint_contexts,
            lambda context, op, *args, **settings: (
                CheckpointPolicy.MUST_SAVE if "convolution" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
            ),
        ),
    ),
}


def train(run: Callable[..., Any], *, explicit: bool, together: bool) -> list[Tensor]:
    """The gradients, and the state, of a tokenizer after steps of two videos each, `run` being a checkpoint or none."""
    model, videos = small_vqvae(), torch.rand(2, 2, 2, 3, 2, 8, 8, generator=seed()) - 0.5
    generator = seed(1) if explicit else None
    torch.manual_seed(5)

    def apply(video: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, quantized = model(video, generator)
        return F.dropout(reconstruction, 0.3), quantized.commitment_loss

    for pair in videos:
        losses = []
        for video in pair:
            reconstruction, commitment = run(apply, video.clone().requires_grad_())
            losses.append(model.reconstruction_loss(reconstruction, video) + commitment)
        for loss in [torch.stack(losses).sum()] if together else losses:  # the first one first
            loss.backward()
    return [*(x.grad for x in model.parameters() if x.grad is not None), *model.buffers()]


class TestActivationCheckpointing:
    """The second run of a forward gives what the first one gave, and moves nothing."""

    @pytest.mark.parametrize(
        "explicit, together", [(False, False), (True, True)], ids=["default generator, a backward each", "the others"]
    )
    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_training_is_the_same(self, kind: str, explicit: bool, together: bool) -> None:
        expected = train(lambda apply, video: apply(video), explicit=explicit, together=together)
        found = train(CHECKPOINTS[kind], explicit=explicit, together=together)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_two_vectors(self, kind: str) -> None:
        """By hand: the gradient of the loss is of the code before it moved."""
        codebook, z = Codebook(1, 1, restart=None), torch.tensor([[[3.0]]], requires_grad=True)
        codebook(torch.tensor([[[1.0]]]))
        CHECKPOINTS[kind](lambda z: codebook(z).commitment_loss, z).backward()
        assert z.grad is not None and z.grad.item() == pytest.approx(0.5 * (3.0 - 1.0))
        assert codebook.N.item() == pytest.approx(1.0)
        assert codebook.z_avg.item() == pytest.approx(0.99 * 1.0 + 0.01 * 3.0)

    @pytest.mark.parametrize("generator", [None, Draws()], ids=["none", "draws"])
    def test_what_follows_draws_the_same(self, generator: Draws | None) -> None:
        codebook, seen = Codebook(6, 4), list[Tensor]()

        def run(z: Tensor) -> Tensor:
            loss = codebook(z, generator).commitment_loss
            seen.append(torch.rand(()))
            return loss * seen[-1]

        again: Any = checkpoint(run, torch.randn(2, 4, 9, requires_grad=True), use_reentrant=False)
        again.backward()
        assert torch.equal(*seen)

    def test_a_backward_twice(self) -> None:
        codebook, z = Codebook(4, 2), torch.randn(1, 2, 9, requires_grad=True)
        loss: Tensor = checkpoint(lambda z: codebook(z).commitment_loss, z, use_reentrant=False)
        gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*gradients)

    def test_all_results_of_a_reentrant_checkpoint(self) -> None:
        """A tensor that both runs return would be an output of itself."""
        codebook, z = Codebook(4, 2), torch.randn(1, 2, 50, requires_grad=True)
        quantized: Any = checkpoint(codebook, z, use_reentrant=True)
        quantized[0].sum().backward()
        assert z.grad is not None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_equal_inputs(self, reentrant: bool) -> None:
        """The codes move between forwards of the same vectors."""
        y, codebook = torch.randn(1, 2, 50), Codebook(4, 2)
        codebook(y)

        def gradient(apply: Any) -> Tensor:
            layer, a, total = copy.deepcopy(codebook), torch.eye(2, requires_grad=True), torch.zeros(())
            for i in range(3):
                torch.manual_seed(10 + i)
                total = total + apply(lambda z: layer(z).commitment_loss, (y.mT @ a).mT)
            total.backward()
            assert a.grad is not None
            return a.grad

        def again(f: Any, z: Tensor) -> Any:
            return checkpoint(f, z, use_reentrant=reentrant)

        torch.testing.assert_close(gradient(again), gradient(lambda f, z: f(z)), rtol=1e-5, atol=1e-6)

    def test_inputs_without_gradient(self) -> None:
        """As of a frozen encoder: no output of the codebook has a graph."""
        codebook, layer = Codebook(4, 2), torch.nn.Linear(2, 2)
        parts = [
            checkpoint(lambda z: layer(codebook(z)[0].mT).square().sum(), torch.randn(1, 2, 50), use_reentrant=False)
            for _ in range(6)
        ]
        torch.stack(parts).sum().backward()
        for _ in range(3):
            codebook(torch.randn(1, 2, 50))
        assert len(codebook._runs._last) == 6  # and none outside of a checkpoint

    def test_nothing_is_kept_longer_than_its_graph(self) -> None:
        codebook = Codebook(4, 2)
        for _ in range(3):
            quantized = codebook(torch.randn(1, 2, 9, requires_grad=True))
        assert len(codebook._runs._held) == 1
        del quantized
        assert len(codebook._runs._held) == 0

    def test_copies(self) -> None:
        codebook = Codebook(4, 2)
        quantized = codebook(torch.randn(1, 2, 9, requires_grad=True))
        for other in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
            assert all(map(torch.equal, other.state_dict().values(), codebook.state_dict().values()))
            other(torch.randn(1, 2, 9))
        quantized.commitment_loss.backward()

    def test_another_forward_in_backward_is_refused(self) -> None:
        codebook, z = Codebook(4, 2), torch.randn(1, 2, 9, requires_grad=True)
        loss = codebook(z).commitment_loss
        loss.register_hook(lambda gradient: codebook(torch.randn(1, 2, 9)) and None)
        with pytest.raises(RuntimeError, match=r"^Codebook: a forward inside of a backward pass must be one that"):
            loss.backward()
        codebook.eval()
        z.grad = None
        loss = codebook(z).commitment_loss
        loss.register_hook(lambda gradient: codebook(torch.randn(1, 2, 9)) and None)
        loss.backward()

    def test_compiled(self) -> None:
        """Dynamo leaves forwards in training as they are."""
        for backend in ("eager", "aot_eager"):
            expected, found = (Codebook(4, 2), Codebook(4, 2))
            found.load_state_dict(expected.state_dict())
            compiled = torch.compile(found, backend=backend)
            for step in range(2):
                zs = [torch.randn(1, 2, 9, generator=seed(step)).requires_grad_() for _ in range(2)]
                for codebook, z in zip((expected, compiled), zs, strict=True):
                    torch.manual_seed(step)
                    loss = checkpoint(
                        lambda z, codebook=codebook: codebook(z, None).commitment_loss, z, use_reentrant=False
                    )
                    loss.backward()
                one, other = (z.grad for z in zs)
                assert one is not None and other is not None and torch.equal(one, other)
            assert torch.equal(found.N, expected.N)
