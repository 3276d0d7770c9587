"""What a video encoder reads, and what it keeps: sparse edges, sparse nodes.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import dataclasses
from typing import Any

import torch

from vattn import _checks
from vattn.layout import BlockLayout
from vattn.models.draws import Randomness, draws_of
from vattn.models.settings import Config, number, official_settings
from vattn.nn.sparse import PAD_KEYS

KEEP_BY = ("cls_attn", "random")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What a video encoder reads and what it keeps. The default is the official setting for 4 frames.

    Args:
        block_size: tokens of a block.
        num_local: how many blocks around it a block reads, itself among them: odd, or 0. The ends meet.
        num_random: how many other blocks it reads, drawn in each layer, and in training in each call. Where there are
            no more blocks than these, each reads all of them, once. None means that every token reads every token.
        keep: share of the tokens that a pruning layer keeps, rounded up; 1 for all.
        prune_after: the layers that prune, counted from 0.
        keep_by: "cls_attn" keeps the tokens that the global token attends to most, "random" any.
        pad_keys: see :class:`vattn.nn.SparseSelfAttention`.

    Example:
        >>> Sparsity().layout(784).density < 0.3                           # 4 blocks of 14, and the global token
        True
        >>> Sparsity(num_random=None, keep=1.0).layout(784) is None        # dense
        True
    """

    block_size: int = 56
    num_local: int = 1
    num_random: int | None = 3
    keep: float = 0.7
    prune_after: tuple[int, ...] = (3, 6, 9)
    keep_by: str = "cls_attn"
    pad_keys: str = "mask"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prune_after", tuple(self.prune_after))  # a file has a list
        op = type(self).__name__
        for name, setting, least in (
            ("block_size", self.block_size, 1), ("num_local", self.num_local, 0),
            ("num_random", 0 if self.num_random is None else self.num_random, 0),
        ):  # fmt: skip
            _checks.integer(op, name, setting, least=least)
        if self.num_local and self.num_local % 2 == 0:
            raise ValueError(f"{op}: num_local must be odd or 0, got num_local={self.num_local}")
        number(op, "keep", self.keep, 0, 1, above=True)
        for i in self.prune_after:
            _checks.integer(op, "prune_after", i, least=0)
        for name, choice, known in (("keep_by", self.keep_by, KEEP_BY), ("pad_keys", self.pad_keys, PAD_KEYS)):
            if choice not in known:
                raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {name}={choice!r}")

    def layout(self, num_tokens: int, generator: Randomness = None) -> BlockLayout | None:
        """Who reads whom among `num_tokens` tokens behind one that is global; None is everyone."""
        if self.num_random is None:
            return None
        num_blocks = -(-num_tokens // self.block_size)
        if num_blocks <= self.num_local + self.num_random:
            return BlockLayout.dense(num_tokens, self.block_size, num_global=1)
        draws = draws_of(generator)
        device = torch.device("cpu") if draws.generator is None else draws.generator.device
        return BlockLayout.local_random(
            num_tokens, self.block_size, num_local=self.num_local, num_random=self.num_random, num_global=1,
            draws=draws.uniforms(num_blocks, num_blocks, device=device),
        )  # fmt: skip


def official_sparsity(op: str, config: Config) -> Sparsity:
    """The sparsity of an official configuration, whose short blocks are filled up with zeros."""
    defaults: dict[str, Any] = {"block_size": 1, "num_local": 0, "num_random": None, "keep": 1.0}
    found = official_settings(
        op, config, Sparsity, block_size="attn_block_size", num_local="sparse_local_attn",
        num_random="sparse_random_attn", keep="token_keep_rate", prune_after="token_drop_loc",
        keep_by="token_keep_strategy",
    )  # fmt: skip
    return Sparsity(**(defaults | found), pad_keys="zero")
