"""The codebook of a VQ-VAE: each vector becomes the nearest of K codes, which follow the vectors they stand for.

    code    = argmin_k |z - e_k|^2,    loss = 0.25 mean (z - e_code)^2,    the gradient of e_code goes to z
    N_k     = 0.99 N_k + 0.01 (vectors of code k),    s_k = 0.99 s_k + 0.01 (their sum),    e_k = s_k / N_k

van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), appendix A.1. A code that hardly any
vector takes is put where a random vector is (Dhariwal et al., "Jukebox", 2020).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from vattn import _checks
from vattn.models.draws import Draws, Randomness, draws_of
from vattn.models.layers import reduction
from vattn.models.recomputation import Run, Runs, in_backward, unseen
from vattn.models.results import exportable
from vattn.models.settings import number
from vattn.ops.nearest_code import nearest_code


@exportable
class Quantized(NamedTuple):
    """What a codebook makes of vectors: their codes, these as vectors, how far off they are, how many are in use."""

    embeddings: Tensor
    codes: Tensor
    commitment_loss: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """The nearest of K codes for each vector. In training, codes move, and begin at the vectors that come first.

    Under ``torch.distributed`` the codes, and the perplexity in training, are those of one process that has the vectors
    of all, one process after the other; random numbers are those of the first. Buffers have the official names, and
    `has_begun`, which the official code keeps elsewhere, is False until the codes are where some vectors were.

    **Numbers.** Codes, counts and sums are float32 in a module of bfloat16 or float16, too, whatever a checkpoint or a
    wrapper makes of them, and float64 in one of float64: steps of a hundredth are below the precision of the others.
    Distances and losses are computed in that dtype; what comes out has the dtype of what went in, but :meth:`lookup`
    gives codes as they are.

    **Vectors that are not finite**, or whose squares are not, get some code, and the loss is not finite, but codes,
    counts and sums are as if they were not there; `left_out` says how many they were in the last forward in training,
    those of all processes. Where no vector is left, nothing moves; the loss of no vectors is 0, and so is the
    perplexity.

    **Activation checkpointing** runs a forward again, in backward. The codes have moved by then: the second run gives
    what the first one gave, and moves nothing. For this, each forward in training is remembered as long as its graph,
    see :class:`vattn.models.recomputation.Runs`. Another forward in training, from a hook in backward, is refused.

    Args:
        num_codes: K.
        dim: channels of a code.
        restart: codes that are taken by fewer vectors, on average over the last steps, go to a random vector; None
            leaves them where they are. Its sums stay, as in the official code: unless vectors take it then, the code
            comes back to where they put it, and goes to another vector.

    Shape:
        ``(B, dim, ...)`` to :class:`Quantized`: embeddings like the input, codes ``(B, ...)`` int64 and two scalars.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.
        RuntimeError: a forward in backward that is not one that ran before; processes of which some have trained.

    Source:
        van den Oord et al., "Neural Discrete Representation Learning", section 3.2 and appendix A.1.

    Example:
        >>> codebook = Codebook(num_codes=16, dim=4)
        >>> quantized = codebook(torch.randn(2, 4, 3, 5, 5))
        >>> quantized.codes.shape, codebook.lookup(quantized.codes).shape
        (torch.Size([2, 3, 5, 5]), torch.Size([2, 4, 3, 5, 5]))
        >>> codebook.bfloat16()(torch.full((1, 4, 2), torch.nan)).embeddings.dtype, codebook.N.dtype, codebook.left_out
        (torch.float32, torch.float32, tensor(2))
    """

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    has_begun: Tensor
    left_out: Tensor | None

    def __init__(self, num_codes: int, dim: int, *, restart: float | None = 1.0) -> None:
        super().__init__()
        for name, size in (("num_codes", num_codes), ("dim", dim)):
            _checks.integer("Codebook", name, size, least=1)
        if restart is not None:
            number("Codebook", "restart", restart, 0)
        self.restart = restart
        dtype = _statistics_dtype(torch.get_default_dtype())
        self.register_buffer("embeddings", torch.randn(num_codes, dim, dtype=dtype))
        self.register_buffer("N", torch.zeros(num_codes, dtype=dtype))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.register_buffer("has_begun", torch.tensor(False))
        self.left_out = None
        self._runs = Runs("Codebook")

    def forward(self, z: Tensor, generator: Randomness = None) -> Quantized:
        if not z.is_floating_point():
            raise TypeError(f"Codebook: z must be a floating-point tensor, got z.dtype={z.dtype}")
        if z.dim() < 2 or z.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"Codebook: z must have shape (B, {self.embeddings.shape[1]}, ...), got z.shape={tuple(z.shape)}"
            )
        return self._train(z, generator) if self.training else self._look(z)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes ``(B, ...)`` to their vectors ``(B, dim, ...)``, in the dtype of the buffers: float32 at least."""
        return F.embedding(codes, self.embeddings).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"restart={self.restart}"

    @_disable_dynamo  # it asks for values, and for the pass that autograd is in; torch.compiler.disable imports Dynamo
    def _train(self, z: Tensor, generator: Randomness) -> Quantized:
        """Quantize and move; or what that gave, if activation checkpointing runs it again."""
        state = torch.random.get_rng_state()
        if in_backward():
            with unseen():
                found, total, num_draws = self._runs.find(z, state)
                draws = draws_of(generator)
                for _ in range(num_draws if draws.generator is None else 0):  # what follows shall draw what it drew
                    self._draw(total, draws, z.device)
            return _quantized(z, found)
        with unseen():
            found, total, num_draws = self._move(z, draws_of(generator))
        quantized = _quantized(z, found)
        run = Run(z, state, (found, total, num_draws))
        self._runs.add(run, quantized.embeddings, quantized.commitment_loss)
        return quantized

    def _move(self, z: Tensor, draws: Draws) -> tuple["_Found", int, int]:
        """Find codes, and move them: what was found, the number of vectors, and how often candidates were drawn."""
        self._widen()
        vectors = self._vectors(z)
        finite = _are_finite(vectors)
        all_finite, has_begun = torch.stack([finite.all(), self.has_begun]).tolist()  # one wait for a GPU
        usable = vectors if all_finite else vectors[finite]
        place = _place(usable, has_begun)
        has_any, begins = place[1] > 0, place[1] > 0 and not has_begun
        if begins:
            self._begin(usable, place, draws)
        found = self._find(z, vectors, finite)
        if has_any:
            codes = found.codes.flatten()
            self._follow(usable, codes if all_finite else codes[finite], found.taken, place, draws)
        return found, place[1], int(begins) + int(has_any)

    def _vectors(self, z: Tensor) -> Tensor:
        """``(B, dim, ...)`` to ``(vectors, dim)``, in the dtype of the statistics."""
        return z.detach().movedim(1, -1).flatten(0, -2).to(_statistics_dtype(self.embeddings.dtype))

    def _look(self, z: Tensor) -> Quantized:
        """Quantize, and leave the codes where they are."""
        vectors = self._vectors(z)
        return _quantized(z, self._find(z, vectors, _are_finite(vectors)))

    def _find(self, z: Tensor, vectors: Tensor, finite: Tensor) -> "_Found":
        """The codes of vectors, from where the codes are now."""
        embeddings = self.embeddings.to(vectors.dtype)
        flat = nearest_code(vectors, embeddings)
        counts = flat.new_zeros(len(embeddings) + 1)  # of each code, and of what is left out
        counts.index_add_(0, torch.where(finite, flat, len(embeddings)), torch.ones_like(flat))
        if self.training:
            if _is_distributed():
                dist.all_reduce(counts)
            self.left_out = counts[-1]
        taken = counts[:-1].to(vectors.dtype)
        total = taken.sum()
        some = total.clamp(min=1)
        # Frequencies, and below frequencies + 1e-10, written so that optimizers of ONNX do not take 1e-10 for 0.
        perplexity = torch.exp(-(taken / some * ((taken + 1e-10 * some) / some).log()).sum())
        codes = flat.view(z.shape[:1] + z.shape[2:])
        nearest = F.embedding(codes, embeddings).movedim(-1, 1)
        return _Found(codes, nearest, taken, torch.where(total > 0, perplexity, 0))

    def _begin(self, vectors: Tensor, place: tuple[int, int], draws: Draws) -> None:
        """Put the codes of a codebook that has never been trained where some vectors are."""
        self.embeddings.copy_(self._candidates(vectors, place, draws))
        self.z_avg.copy_(self.embeddings)
        self.N.fill_(1.0)
        self.has_begun.fill_(True)

    def _follow(self, vectors: Tensor, codes: Tensor, taken: Tensor, place: tuple[int, int], draws: Draws) -> None:
        """Move the codes towards the vectors that took them, and those that few take to other vectors."""
        sums = torch.zeros_like(self.z_avg, dtype=torch.float64)  # of equal vectors, float32 rounds all to one side
        sums = sums.index_add_(0, codes, vectors.double()).to(self.z_avg.dtype)
        if _is_distributed():
            dist.all_reduce(sums)
        self.N.mul_(0.99).add_(taken, alpha=0.01)
        self.z_avg.mul_(0.99).add_(sums, alpha=0.01)
        total = self.N.sum()
        share = (self.N + 1e-7) / (total + len(self.N) * 1e-7)
        embeddings = self.z_avg / (share * total)[:, None]
        candidates = self._candidates(vectors, place, draws)
        if self.restart is not None:
            embeddings = torch.where(self.N[:, None] >= self.restart, embeddings, candidates)
        self.embeddings.copy_(embeddings)

    def _candidates(self, vectors: Tensor, place: tuple[int, int], draws: Draws) -> Tensor:
        """As many random vectors, of all processes, as there are codes; if there are fewer, copies with some noise."""
        first, total = place
        chosen, noise = self._draw(total, draws, vectors.device)
        if _is_distributed():
            dist.broadcast(chosen, 0)
            dist.broadcast(noise, 0)
        mine = chosen % total - first
        is_mine = (mine >= 0) & (mine < len(vectors))
        padded = F.pad(vectors, (0, 0, 0, 1))  # a process may have none
        candidates = padded[torch.where(is_mine, mine, len(vectors))]
        if _is_distributed():  # each row is there in one process, and 0 in the others
            dist.all_reduce(candidates)
        return candidates + noise

    def _draw(self, total: int, draws: Draws, device: torch.device) -> tuple[Tensor, Tensor]:
        """The numbers of as many random vectors as there are codes, and the noise on them; drawn by the first process.

        Numbers are those of `total` vectors, again and again if there are fewer than codes.
        """
        num_codes, dim = self.embeddings.shape
        repeats = -(-num_codes // total)
        noise = torch.zeros(num_codes, dim, dtype=self.embeddings.dtype, device=device)
        chosen = torch.zeros(num_codes, dtype=torch.int64, device=device)
        if not _is_distributed() or dist.get_rank() == 0:
            scatter = draws.normal(repeats * total, dim, device=device) if repeats > 1 else None
            chosen = draws.permutation(1, repeats * total, device)[0, :num_codes].contiguous()
            if scatter is not None:
                noise = scatter[chosen].to(noise.dtype) * 0.01 / dim**0.5
        return chosen, noise

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, getattr(self, name)) for name in ("embeddings", "N", "z_avg"))

    def _widen(self) -> None:
        """Make statistics float32 again where a wrapper has cast buffers, as those of mixed precision do."""
        for _, buffer in self._statistics():
            if buffer.dtype != _statistics_dtype(buffer.dtype):
                buffer.data = buffer.to(_statistics_dtype(buffer.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``bfloat16`` and others do, but to no dtype that is too narrow for statistics."""

        def apply(buffer: Tensor) -> Tensor:
            found = fn(buffer)
            wanted = _statistics_dtype(found.dtype)
            return found if found.dtype == wanted else buffer.to(device=found.device, dtype=wanted)

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, _ in self._statistics():
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                state_dict[f"{prefix}{name}"] = value.to(_statistics_dtype(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Found(NamedTuple):
    """Codes, these as vectors, how many vectors took each, and the perplexity."""

    codes: Tensor
    nearest: Tensor
    taken: Tensor
    perplexity: Tensor


def _quantized(z: Tensor, found: _Found) -> Quantized:
    """What a codebook says of `z`: its gradient goes straight through, and in the loss towards the codes."""
    wide = z.to(torch.promote_types(z.dtype, found.nearest.dtype))
    loss = 0.25 * F.mse_loss(wide, found.nearest.to(wide.dtype), reduction=reduction(wide))
    embeddings = wide + (found.nearest - wide).detach()
    # Its own tensors: a second run of a forward must not return what the first one gave to somebody's graph.
    codes, perplexity = found.codes.clone(), found.perplexity.to(z.dtype, copy=True)
    return Quantized(embeddings.to(z.dtype), codes, loss.to(z.dtype), perplexity)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics where others have `dtype`."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _are_finite(vectors: Tensor) -> Tensor:
    """Which of the vectors ``(N, dim)`` have a distance to codes."""
    return vectors.square().sum(1).isfinite()


def _place(vectors: Tensor, has_begun: bool) -> tuple[int, int]:
    """Where the vectors of this process begin among those of all processes, and how many these are.

    Raises:
        RuntimeError: the codebook has begun in some processes only, which would wait for the others.
    """
    if not _is_distributed():
        return 0, len(vectors)
    rank, size = dist.get_rank(), dist.get_world_size()
    told = torch.zeros(size + 1, dtype=torch.int64, device=vectors.device)
    told[rank], told[-1] = len(vectors), int(has_begun)
    dist.all_reduce(told)
    *lengths, begun = told.tolist()
    if begun not in (0, size):
        raise RuntimeError(
            f"Codebook: has_begun must be the same in all processes, got True in {begun} of {size}: all must load the "
            "same checkpoint"
        )
    return sum(lengths[:rank]), sum(lengths)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
