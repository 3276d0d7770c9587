"""Leap attention and the periodic shift over ranks are those of one device: results, derivatives, masks and bytes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.processes import Found, SentBytes, World, lengths_of, results, run_cases
from tests.distributed.sharded_calls import BOUNDS, Call
from tests.distributed.simulated import run_ranks
from vattn import distributed, leap_attention, periodic_shift
from vattn.distributed._leap_plan import plan_leap
from vattn.distributed._ranks import PaperRanks

D = 6


def call(
    frames: int, lengths: Sequence[int], leap: int, *, batch: int = 2, heads: int = 3, tokens: int = 2, **settings: Any
) -> Call:
    """A leap attention of frames that lie on ranks."""
    shape = (batch, heads, frames, tokens, D)
    return Call(leap_attention, distributed.leap_attention, shape, 2, lengths, (leap,), **settings)


def shift_call(frames: int, lengths: Sequence[int], fold_div: int, **settings: Any) -> Call:
    shape = (2, 3, frames, 2, D)
    return Call(periodic_shift, distributed.periodic_shift, shape, 2, lengths, (fold_div,), inputs=1, **settings)
