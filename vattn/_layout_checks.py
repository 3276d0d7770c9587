"""What the tensors of a block layout must be: see :class:`vattn.BlockLayout`."""

import torch
from torch import Tensor

from vattn import _checks


def count_blocks(op: str, num_tokens: int, block_size: int, num_global: int) -> int:
    """How many blocks the tokens that are not global have."""
    _checks.integer(op, "num_tokens", num_tokens, least=0)
    _checks.integer(op, "block_size", block_size, least=1)
    _checks.integer(op, "num_global", num_global, least=0)
    if block_size >= 2**63:
        raise ValueError(f"{op}: block_size must be less than 2**63, got block_size={block_size}")
    return -(-num_tokens // block_size)


def check_tensors(op: str, row_offsets: Tensor, columns: Tensor, order: Tensor | None, blocks: int) -> None:
    """Dtypes, shapes and devices fit a layout of so many blocks."""
    _checks.index_tensor(op, "row_offsets", row_offsets)
    _checks.index_tensor(op, "columns", columns)
    if row_offsets.dim() not in (1, 2, 3) or row_offsets.shape[-1] != blocks + 1 or 0 in row_offsets.shape:
        raise ValueError(
            f"{op}: row_offsets must have shape ({blocks + 1},), (L, {blocks + 1}) or (S, L, {blocks + 1}), "
            f"got row_offsets.shape={tuple(row_offsets.shape)}"
        )
    if columns.dim() != 1:
        raise ValueError(f"{op}: columns must have shape (nnz,), got columns.shape={tuple(columns.shape)}")
    for name, x in (("columns", columns), ("order", order)):
        if x is not None and x.device != row_offsets.device:
            raise ValueError(
                f"{op}: {name} must be on the device of row_offsets ({row_offsets.device}), "
                f"got {name}.device={x.device}"
            )


def blocks_of_order(op: str, order: object, block_size: int) -> int:
    """How many blocks the slots of `order` make."""
    shape = _checks.index_tensor(op, "order", order).shape
    if len(shape) != 1 or shape[0] % block_size != 0:
        raise ValueError(
            f"{op}: order must have shape (M * block_size,), "
            f"got order.shape={tuple(shape)} with block_size={block_size}"
        )
    return shape[0] // block_size


def check_rows(op: str, row_offsets: Tensor, columns: Tensor) -> None:
    """The rows follow each other and end with `columns`, and every column is a block."""
    sets, blocks = row_offsets.flatten(0, -2), row_offsets.shape[-1] - 1
    flat = sets.flatten()
    chained = int(flat[0]) == 0 and int(flat[-1]) == columns.numel() and bool((flat.diff() >= 0).all())
    if not chained or not torch.equal(sets[1:, 0], sets[:-1, -1]):
        raise ValueError(
            f"{op}: row_offsets must grow from 0 to the number of columns ({columns.numel()}), each head's from where "
            f"the last one's ended, got row_offsets={row_offsets.tolist()}"
        )
    outside = (columns < 0) | (columns >= blocks)
    if bool(outside.any()):
        at = int(outside.int().argmax())
        raise ValueError(
            f"{op}: columns must be below the number of blocks ({blocks}), got columns[{at}]={int(columns[at])}"
        )


def check_order(op: str, order: Tensor, num_tokens: int, block_size: int) -> None:
    """Every token stands in one slot, and no token stands behind a -1 in its block."""
    outside = (order < -1) | (order >= num_tokens)
    if bool(outside.any()):
        at = int(outside.int().argmax())
        raise ValueError(f"{op}: order must hold tokens below {num_tokens}, or -1, got order[{at}]={int(order[at])}")
    times = torch.bincount(order[order >= 0], minlength=num_tokens)
    wrong = times != 1
    if bool(wrong.any()):
        token = int(wrong.int().argmax())
        raise ValueError(f"{op}: order must hold every token once, got token {token} {int(times[token])} times")
    behind = torch.nn.functional.pad((order < 0).view(-1, block_size)[:, :-1], (1, 0)).view(-1) & (order >= 0)
    if bool(behind.any()):
        at = int(behind.int().argmax())
        raise ValueError(f"{op}: -1 must come last in a block of order, got order[{at}]={int(order[at])} behind a -1")
