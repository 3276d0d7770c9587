"""The numbers that rows have on one device: dropout over ranks draws the same mask."""

from collections.abc import Sequence

import torch
from torch import Tensor


def with_numbers(
    seed: Tensor | None, batch: int, heads: int, queries: Sequence[Tensor | range], keys: Sequence[Tensor | range],
    *, first_head: int = 0, all_heads: int | None = None, first_sample: int = 0,
) -> Tensor | None:  # fmt: skip
    """`seed` with the numbers of batch-heads, query tokens and key tokens: see ``vattn.reference.dropout``.

    Numbers of tokens come in pieces, one after the other. A seed may have those of all batch-heads already. None
    stays None.
    """
    if seed is None:
        return None
    total = heads if all_heads is None else all_heads
    if seed.numel() == 1:
        samples = torch.arange(first_sample, first_sample + batch, device=seed.device)
        batch_heads = samples[:, None] * total + torch.arange(first_head, first_head + heads, device=seed.device)
    else:
        of_heads = seed[1:].view(-1, total)[first_sample : first_sample + batch]
        batch_heads = of_heads[:, first_head : first_head + heads]
    pieces = [seed.flatten()[:1], batch_heads.flatten()]
    for piece in (*queries, *keys):
        on = torch.arange(piece.start, piece.stop, device=seed.device) if isinstance(piece, range) else piece
        pieces.append(on.to(seed.device, torch.int64))
    return torch.cat(pieces)
