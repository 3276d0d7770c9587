"""Which attention weights dropout keeps: a hash of (seed, batch and head, query, key).

The decision depends only on *which* query reads *which* key, never on tiles, threads or devices, so the
backward finds the same mask again, and a CPU and a GPU agree on it. All arithmetic is on unsigned 32-bit
integers; ``mix`` is the two-multiply finalizer "lowbias32" (C. Wellons, hash-prospector)::

    a     = mix(mix(seed_low + bh) ^ seed_high)     # one per batch and head
    add   = mix(a + query)                          # two per query ...
    times = mix(add ^ a) | 1
    bits  = mix(key * times + add)                  # ... one per query and key
    keep  = (bits >> 8) >= ceil(p * 2**24)

A call on a part of a batch, of the heads or of the tokens draws its part of the mask of the whole call, if its seed
comes with the numbers that these have in the whole: see :func:`numbered`.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) that spreads every bit over all bits."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _MASK
    return x ^ (x >> 15)


def dropout_keep(seed: Tensor, bh: Tensor, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """True where a weight is kept. `bh`, `query`, `key` are int64 indices that broadcast together.

    `bh` is ``batch * heads + head``; `query` and `key` are the operator's own token numbers. `seed` is one
    int64. `dropout_p=1` keeps nothing, `0` everything.
    """
    seed = seed.reshape(()).to(bh.device)
    a = mix(mix((seed & _MASK) + bh) ^ ((seed >> 32) & _MASK))
    add = mix(a + query)
    times = mix(add ^ a) | 1
    bits = mix(key * times + add)
    return (bits >> 8) >= math.ceil(dropout_p * 2**24)


def numbered(seed: Tensor, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The seed alone, and the numbers of batches and heads, of query tokens and of key tokens.

    Args:
        seed: one int64, for numbers from 0 on; or ``1 + heads + queries + keys`` of them: behind the seed the number of
            each batch and head, in the order ``batch * heads + head``, of each query token and of each key token. What
            numbers hold beyond 32 bits is not looked at.
        heads, queries, keys: how many there are, heads of all samples.
    """
    if seed.numel() == 1:
        of_heads, of_queries, of_keys = (torch.arange(n, device=seed.device) for n in (heads, queries, keys))
        return seed, of_heads, of_queries, of_keys
    if seed.shape != (1 + heads + queries + keys,):
        raise ValueError(
            f"dropout: seed must have 1 element or 1 + {heads} + {queries} + {keys}, got seed.shape={tuple(seed.shape)}"
        )
    own, of_heads, of_queries, of_keys = seed.split([1, heads, queries, keys])
    return own, of_heads, of_queries, of_keys


def random_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from torch's generator: one int64 on `device`, so that a GPU never waits."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
