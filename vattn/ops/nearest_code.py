"""The nearest code of each vector, without the distances in memory.

    index = argmin_k |x - c_k|^2        the lowest k on ties

The step between encoder and decoder of a VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning",
NeurIPS 2017)::

    x 0.9 -0.2  ->  codes  0: (0, 0)   1: (1, 0)   2: (0, 1)    ->  1
"""

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._library import runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn._operator import Operator


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code that is nearest to each vector, in Euclidean distance.

    The distances are never in memory: beyond the result it takes a number for each code and some scratch, on a GPU also
    a copy of the codebook. There is no gradient: an index has none.

    Args:
        x: ``(..., C)``, float32, bfloat16, float16 or float64, any strides.
        codebook: ``(K, C)``, with K and C at least 1, in the dtype of `x`. Under autocast dtypes may differ, and both
            are read as float32, as those of ``torch.cdist`` are.

    Returns:
        int64 ``(...)``, contiguous: between 0 and K - 1, the lowest of equally near codes. A code with a NaN or an
        infinity is nobody's nearest, and a vector with one gets 0; with squares beyond float32 the index is some valid
        one.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape that does not fit.

    Source:
        van den Oord et al., "Neural Discrete Representation Learning", on vector quantisation.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> nearest_code(torch.tensor([[0.9, -0.2], [0.1, 0.8], [0.5, 0.0]]), codebook)
        tensor([1, 2, 0])
    """
    op = "nearest_code"
    _check(x, codebook)
    x, codebook = x.detach(), codebook.detach()
    if on_mesh(x, codebook):
        return over_mesh(op, x=x, codebook=codebook)
    if runs_reference(x, op):
        return reference.nearest_code(x, codebook)
    return _nearest(x, codebook)


@once
def _check(x: Tensor, codebook: Tensor) -> tuple[()]:
    op = "nearest_code"
    _checks.tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., C), got x.shape=()")
    _checks.tensor(op, "codebook", codebook)
    _checks.rank(op, "codebook", codebook, "(K, C)")
    _checks.same(op, "x", x, "codebook", codebook, shape=False)
    if 0 in codebook.shape:
        raise ValueError(f"{op}: codebook must not be empty, got codebook.shape={tuple(codebook.shape)}")
    if codebook.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: codebook must have the channels of x ({x.shape[-1]}), got codebook.shape={tuple(codebook.shape)}"
        )
    return ()


def _check_codes(x: Tensor, codebook: Tensor) -> None:
    if 0 in codebook.shape:
        raise ValueError(f"nearest_code: codebook must not be empty, got codebook.shape={tuple(codebook.shape)}")


_nearest = Operator(
    "nearest_code(Tensor x, Tensor codebook) -> Tensor index",
    takes={"x": "... C", "codebook": "K C"},
    also=_check_codes,
    fake=lambda x, codebook: x.new_empty(x.shape[:-1], dtype=torch.int64),
    constant=("index",),
    autocast=("x", "codebook"),
    autocast_to=torch.float32,
    shared=("codebook",),
    any_axes=True,
    flops=lambda x, codebook: 2 * x.numel() * codebook.shape[0],
)
