"""The codebook of a VQ-VAE: each vector becomes the nearest of K codes, which follow the vectors they stand for.

    code    = argmin_k |z - e_k|^2,    loss = 0.25 mean (z - e_code)^2,    the gradient of e_code goes to z
    N_k     = 0.99 N_k + 0.01 (vectors of code k),    s_k = 0.99 s_k + 0.01 (their sum),    e_k = s_k / N_k

van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), appendix A.1. A code that hardly any
vector takes is put where a random vector is (Dhariwal et al., "Jukebox", 2020).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.draws import Draws, Randomness, draws_of
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

    Source:
        van den Oord et al., "Neural Discrete Representation Learning", section 3.2 and appendix A.1.

    Example:
        >>> codebook = Codebook(num_codes=16, dim=4)
        >>> quantized = codebook(torch.randn(2, 4, 3, 5, 5))
        >>> quantized.codes.shape, codebook.lookup(quantized.codes).shape
        (torch.Size([2, 3, 5, 5]), torch.Size([2, 4, 3, 5, 5]))
    """

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    has_begun: Tensor

    def __init__(self, num_codes: int, dim: int, *, restart: float | None = 1.0) -> None:
        super().__init__()
        for name, size in (("num_codes", num_codes), ("dim", dim)):
            _checks.integer("Codebook", name, size, least=1)
        if restart is not None:
            number("Codebook", "restart", restart, 0)
        self.restart = restart
        self.register_buffer("embeddings", torch.randn(num_codes, dim))
        self.register_buffer("N", torch.zeros(num_codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.register_buffer("has_begun", torch.tensor(False))

    def forward(self, z: Tensor, generator: Randomness = None) -> Quantized:
        if z.dim() < 2 or z.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"Codebook: z must have shape (B, {self.embeddings.shape[1]}, ...), got z.shape={tuple(z.shape)}"
            )
        vectors = z.detach().movedim(1, -1).flatten(0, -2).to(self.embeddings.dtype)
        draws = draws_of(generator)
        if self.training and not self.has_begun:
            self._begin(vectors, draws)
        flat = nearest_code(vectors, self.embeddings)
        counts = flat.new_zeros(len(self.embeddings)).index_add_(0, flat, torch.ones_like(flat))
        taken = counts.to(vectors.dtype)
        if self.training and _is_distributed():
            dist.all_reduce(taken)
        frequencies = taken / taken.sum()
        perplexity = torch.exp(-(frequencies * (frequencies + 1e-10).log()).sum())
        codes = flat.view(z.shape[:1] + z.shape[2:])
        embeddings = self.lookup(codes)
        if self.training:
            self._follow(vectors, flat, taken, draws)
        return Quantized(z + (embeddings - z).detach(), codes, 0.25 * F.mse_loss(z, embeddings), perplexity)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes ``(B, ...)`` to their vectors ``(B, dim, ...)``."""
        return F.embedding(codes, self.embeddings).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"restart={self.restart}"

    def _begin(self, vectors: Tensor, draws: Draws) -> None:
        """Put the codes of a codebook that has never been trained where some vectors are."""
        self.embeddings.copy_(self._candidates(vectors, draws))
        self.z_avg.copy_(self.embeddings)
        self.N.fill_(1.0)
        self.has_begun.fill_(True)

    def _follow(self, vectors: Tensor, codes: Tensor, taken: Tensor, draws: Draws) -> None:
        """Move the codes towards the vectors that took them, and those that few take to other vectors."""
        sums = torch.zeros_like(self.z_avg).index_add_(0, codes, vectors)
        if _is_distributed():
            dist.all_reduce(sums)
        self.N.mul_(0.99).add_(taken, alpha=0.01)
        self.z_avg.mul_(0.99).add_(sums, alpha=0.01)
        total = self.N.sum()
        share = (self.N + 1e-7) / (total + len(self.N) * 1e-7)
        embeddings = self.z_avg / (share * total)[:, None]
        candidates = self._candidates(vectors, draws)
        if self.restart is not None:
            embeddings = torch.where(self.N[:, None] >= self.restart, embeddings, candidates)
        self.embeddings.copy_(embeddings)

    def _candidates(self, vectors: Tensor, draws: Draws) -> Tensor:
        """As many random vectors, of all processes, as there are codes; if there are fewer, copies with some noise."""
        num_codes, dim = self.embeddings.shape
        first, total = _place(vectors)
        repeats = 1 if total >= num_codes else -(-num_codes // total)
        noise = vectors.new_zeros(num_codes, dim)
        chosen = torch.zeros(num_codes, dtype=torch.int64, device=vectors.device)
        if not _is_distributed() or dist.get_rank() == 0:
            scatter = draws.normal(repeats * total, dim, device=vectors.device) if repeats > 1 else None
            chosen = draws.permutation(1, repeats * total, vectors.device)[0, :num_codes]
            if scatter is not None:
                noise = scatter[chosen].to(vectors.dtype) * 0.01 / dim**0.5
        if _is_distributed():
            dist.broadcast(chosen, 0)
            dist.broadcast(noise, 0)
        mine = chosen % total - first
        is_mine = (mine >= 0) & (mine < len(vectors))
        candidates = torch.where(is_mine[:, None], vectors[mine.clamp(0, len(vectors) - 1)], 0)
        if _is_distributed():  # each row is there in one process, and 0 in the others
            dist.all_reduce(candidates)
        return candidates + noise


def _place(vectors: Tensor) -> tuple[int, int]:
    """Where the vectors of this process begin among those of all processes, and how many these are."""
    if not _is_distributed():
        return 0, len(vectors)
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=vectors.device)
    lengths[dist.get_rank()] = len(vectors)
    dist.all_reduce(lengths)
    return int(lengths[: dist.get_rank()].sum()), int(lengths.sum())


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
