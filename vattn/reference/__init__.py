"""The operators in plain PyTorch: what each one means, on any device and in any dtype.

Written to be read and trusted, not to be fast: the kernels are tested against these in float64.
"""

from vattn.reference.attention import attention
from vattn.reference.axial_attention import axial_attention
from vattn.reference.dropout import dropout_keep
from vattn.reference.edge_sparse_attention import edge_sparse_attention
from vattn.reference.latent_attention import latent_attention
from vattn.reference.leap_attention import leap_attention, leap_groups
from vattn.reference.merge_attention import merge_attention
from vattn.reference.nearest_code import nearest_code
from vattn.reference.node_sparse_attention import node_sparse_attention
from vattn.reference.periodic_shift import periodic_shift
from vattn.reference.select_tokens import select_tokens
from vattn.reference.token_importance import token_importance

__all__ = [
    "attention",
    "axial_attention",
    "dropout_keep",
    "edge_sparse_attention",
    "latent_attention",
    "leap_attention",
    "leap_groups",
    "merge_attention",
    "nearest_code",
    "node_sparse_attention",
    "periodic_shift",
    "select_tokens",
    "token_importance",
]
