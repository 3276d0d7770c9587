"""What an operator tells the driver: which rows a program owns, which it reads next, and where they lie.

    own           the tile of rows that a program owns, and what it shares: `group`
    span          the places that it reads, of each tensor of keys
      locate      the rows at the next places        tile     |-------|-------|-------|--- :
      offsets     where they lie                     places   first              whole  last
      number      their numbers

A `row` is whatever the operator makes of it, a tuple of tensors; so is `group`. The rows that a program reads are keys
of the rows that it owns, or queries: an operator may have an itinerary for either.

What an operator does not do is a hook that is None, and no hook returns None: Triton 3.6 has no such value.
"""

import dataclasses
from typing import Any

NUMBERS = 8


@dataclasses.dataclass(frozen=True, eq=False)  # Triton looks kernels up by it: an address is compared in no time
class Itinerary:
    """Functions of ``@triton.jit``. `where` is what the launcher hands over: pointers, and eight numbers.

    `OF_KEYS` tells whether the program owns keys and reads queries, `WHOLE` whether all places of the tile exist.
    """

    own: Any  # (where, H, heads, BLOCK, OTHER) -> bh, split, group, first, last: of the rows it owns
    span: Any  # (group, BLOCK, I) -> first, whole, last: of tensor I, and how far tiles need no mask
    lanes: Any  # (group, BLOCK) -> what `locate` wants of lanes, once for all tiles
    locate: Any  # (start, lanes, last, group, I, WHOLE) -> row
    offsets: Any  # (row, strides, SHAPE) -> offsets within a batch and head
    number: Any  # (row, group) -> token numbers, for dropout, and of queries for lse and delta
    exists: Any = None  # (row) -> mask; None: the places before the last, at most one tile of which is not whole
    mine: Any = None  # (first, last, group, BLOCK) -> row: those owned, where they are not located as those read
    reads: Any = None  # (row, group) -> mask: which of the keys owned are read at all
    load: Any = None  # (ptr, row, mask, strides, group, SHAPE, OP) -> rows, of tensors that lie as the output
    store: Any = None  # (ptr, row, mask, rows, strides, group, SHAPE, OP): the output
    pair: Any = None  # (where, row, mask, group, OF_KEYS) -> what the own rows tell of pairs
    bias: Any = None  # (where, pair, row, mask, group, OF_KEYS, WHOLE) -> bias (own, others), and its place in a table
    bias_tangent: Any = None  # (where, pair, place) -> its tangent
    allowed: Any = None  # (where, pair, row, mask, group, OF_KEYS) -> mask (own, others)
    tap: Any = None  # (where, scores, own_row, row, mask, group): looks at the final scores of the forward
    grad_start: Any = None  # (BLOCK) -> state of the bias's gradient
    grad_step: Any = None  # (where, state, ds, place, pair, row, mask, own_mask, group, WHOLE) -> state
    grad_finish: Any = None  # (where, state, own_row, mask, pair, group)
    grad_offsets: Any = None  # (row, strides, SHAPE) -> offsets of gradients of keys that do not lie as the keys do
    times: Any = None  # (where, row, mask, group) -> how often a key is read: a factor of its gradients
    constants: Any = None  # of the hooks, known when a kernel is compiled

    @property
    def cache_key(self) -> str:
        """Of the sources of all hooks. Without it Triton's cache on disk would tell them apart by their names alone."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return "-".join(str(getattr(field, "cache_key", field)) for field in fields)

    def __repr__(self) -> str:
        return self.cache_key
