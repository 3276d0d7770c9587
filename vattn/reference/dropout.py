"""Which attention weights dropout keeps: a hash of (seed, batch and head, query, key).

The decision depends only on *which* query reads *which* key, never on tiles, threads or devices, so the
backward finds the same mask again, and a CPU and a GPU agree on it. All arithmetic is on unsigned 32-bit
integers; ``mix`` is the two-multiply finalizer "lowbias32" (C. Wellons, hash-prospector)::

    a     = mix(mix(seed_low + bh) ^ seed_high)     # one per batch and head
    add   = mix(a + query)                          # two per query ...
    times = mix(add ^ a) | 1
    bits  = mix(key * times + add)                  # ... one per query and key
    keep  = (bits >> 8) >= ceil(p * 2**24)
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


def random_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from torch's generator: one int64 on `device`, so that a GPU never waits."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
