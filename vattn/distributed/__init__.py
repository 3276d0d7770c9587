"""The operators over the ranks of a process group: plain functions on local shards.

Results and gradients are those of one device, whatever the lengths of the shards, which may be empty. ``group`` is a
ProcessGroup, a one-dimensional DeviceMesh, or None for the default group; shards lie in the order of ranks, and all
ranks make the same calls in the same order. A backward is such a call: all ranks differentiate the same results, by the
same inputs. Over several ranks ``torch.func.vmap`` raises NotImplementedError.

The ranks compare their calls, and one that differs raises on all of them. Where ``lengths`` are given, calls in
compiled code and on GPUs are not compared, and a mismatch is not noticed: gloo ends the process that receives more
than it expects, and NCCL waits. ``TORCH_DISTRIBUTED_DEBUG=INFO`` or ``DETAIL`` compares eager calls on GPUs.

A DTensor is for the public operators, which run on its parts, or take these functions where tokens are sharded.
"""

from torch.distributed import is_available

if not is_available():
    raise ImportError("vattn.distributed: PyTorch must be built with distributed support, got is_available()=False")

from vattn.distributed.axial_attention import axial_attention
from vattn.distributed.bytes_sent import bytes_sent
from vattn.distributed.edge_sparse_attention import edge_sparse_attention
from vattn.distributed.latent_attention import latent_attention
from vattn.distributed.leap_attention import leap_attention
from vattn.distributed.node_sparse_attention import node_sparse_attention
from vattn.distributed.parallelize import parallelize, share_of
from vattn.distributed.periodic_shift import periodic_shift
from vattn.distributed.select_tokens import select_tokens
from vattn.distributed.token_importance import token_importance

__all__ = [
    "axial_attention",
    "bytes_sent",
    "edge_sparse_attention",
    "latent_attention",
    "leap_attention",
    "node_sparse_attention",
    "parallelize",
    "periodic_shift",
    "select_tokens",
    "share_of",
    "token_importance",
]
