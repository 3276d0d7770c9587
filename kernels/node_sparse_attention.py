"""Node-sparse attention on the GPU: latent attention over keys that are listed, and gathered where they lie.

    key      0   1   2   3   4   5   6   7         kept = [5, 1, 2]
    number       1   2           5                 tiles of three keys; the others are not read, and their gradient is 0

The kernels are those of latent attention, with their splits of many keys over few queries and of many queries over few
keys. SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from torch import Tensor

from vattn.kernels import latent_attention


def forward(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Lq, D), in memory as (B, Lq, H, D), and the float32 lse (B, H, Lq)."""
    return latent_attention.forward(query, [key], [value], None, dropout_p, seed, scale, kept)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    kept: Tensor, dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, alike every time: nothing is added by atomics but integers."""
    dq, (dk,), (dv,) = latent_attention.backward(
        grad_out, grad_lse, query, [key], [value], out, lse, None, dropout_p, seed, scale, kept
    )
    return dq, dk, dv
