"""The selection of tokens: how the tests call it. Its CUDA C++ kernel has tests of its own."""

import functools

import torch

import vattn
from tests.calls import Call, leaves


def call(dtype: torch.dtype) -> Call:
    select = functools.partial(vattn.select_tokens, importance=torch.rand(2, 4), keep=0.5)
    return Call(lambda tokens: select(tokens)[0], leaves((2, 5, 3), dtype=dtype))
