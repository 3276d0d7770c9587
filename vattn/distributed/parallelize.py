"""A model over ranks: each has a share of the video's tokens, and all of the parameters.

codes, positions, layouts    integers, the same on every rank
tokens                       contiguous shares, in the order of ranks: rank r of R has r n / R .. (r + 1) n / R of n
latents, the global token    the same on every rank
parameters                   the same on every rank, unless FSDP shards them
"""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from vattn._over_ranks import Held, OverRanks
from vattn.distributed._ranks import Ranks, ranks_of

OP = "parallelize"
EXACT = "attn_drop"
"""The dropout of attention weights draws one device's mask."""

Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, mesh: Any = None) -> Model:
    """Spread the tokens of each video over the ranks of a group, in the manner of PyTorch's ``parallelize_module``.

    The model is changed in place; its state dict stays as it is, and results and gradients are those of one process::

        model                                       a rank is given            and gives
        MeBT                                        codes and positions, all   logits of its share of the targets
        LapsViT, LapsVisformer, VideoFromImage      its share of the frames    the mean over all frames
        VideoEncoder                                the video, all of it       tokens of its share of the blocks,
                                                                               and the pooled vector of all

    :func:`share_of` says which share that is. A rank has embeddings, activations and logits of its share alone.

    **One rule for gradients.** The loss is the sum of the ranks' losses, and the gradient of a parameter is the sum of
    the ranks' gradients: one sum over the group after a backward makes it that of one process. `training_loss` gives a
    rank's part of the loss. A loss of your own that is the same on every rank, as one of the logits of LAPS is, must be
    divided by the number of ranks. DDP and FSDP take the mean over their ranks, not the sum: multiply the loss by the
    size of this group, and they are right, also where they have other ranks with other videos. DDP sums gradients of
    calls of the wrapper alone, not of ``wrapped.module.training_loss``: wrap a module whose forward is the loss.

    All ranks make the same draws: they seed torch, or the generators that they pass, with the same number. Copies of
    the model are over the same ranks. It is not pickled: ``state_dict``, ``save_pretrained`` and
    ``torch.distributed.checkpoint`` save it, and what `from_pretrained` loads is over no ranks.

    ``torch.compile`` comes last, and does not make the ranks compare their inputs. Of a SViTT, the part ``model.video``
    can be over ranks; its texts read all tokens of a video, so that its losses refuse that.

    Args:
        model: one of those above, with the same weights on every rank. DDP and FSDP come after this.
        mesh: a one-dimensional DeviceMesh, such as ``mesh["context"]``, a ProcessGroup, or None for the default group.

    Returns:
        `model`.

    Raises:
        TypeError: the model is none of these, or `mesh` no group. Later, where the model is pickled.
        ValueError: the mesh has more dimensions, or the model is over ranks already, or has a setting that does not
            work over them: dropout of anything but attention weights, since its masks would differ; a MeBT with blocks
            of the mode "maskgit"; LAPS with fewer frames than ranks; a VideoEncoder that prunes, since a rank would
            keep another number of tokens of each video.

    Source:
        Li et al., "Sequence Parallelism: Long Sequence Training from System Perspective" (ACL 2023), for models whose
        tokens lie on several devices.

    Example:
        >>> from vattn.models.mebt import MeBT
        >>> model = MeBT(10, (2, 2, 2), dim=32, num_heads=2, modes=("latent_enc", "latent_dec"), num_latents=4)
        >>> model = parallelize(model, group)
        >>> model.training_loss(torch.randint(10, (3, 2, 2, 2))).backward()     # then sum the gradients over the group
    """
    ranks = _ranks_of(OP, mesh)
    if not isinstance(model, OverRanks):
        raise TypeError(
            f"{OP}: model must be MeBT, LapsViT, LapsVisformer, VideoFromImage or VideoEncoder, "
            f"got model={type(model).__name__}{_hint(model)}"
        )
    if model.ranks is not None:
        raise ValueError(f"{OP}: model must be over no ranks yet, got one over {model.ranks.size}")
    parts = [module for module in model.modules() if isinstance(module, OverRanks)]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and name.rpartition(".")[2] != EXACT:
            _require_zero(f"{name}.p", module.p)
        for setting in ("drop_path", "drop_prob"):
            if isinstance(value := getattr(module, setting, None), (int, float)):
                _require_zero(f"{name}.{setting}", value)
    for part in parts:
        part._refuse(ranks)
    held = Held(ranks)
    for part in parts:
        part._held = held
    return model


def share_of(total: int, mesh: Any = None) -> range:
    """This rank's share of `total` frames, contexts or targets of a model that is parallelized over `mesh`.

    Example:
        >>> share_of(8, group)
        range(0, 8)
    """
    return _ranks_of("share_of", mesh).share(total)


def _hint(model: object) -> str:
    """Which part of a wrapper, or of a larger model, has all that can be spread."""
    if not isinstance(model, nn.Module):
        return ""
    names = [name for name, module in model.named_modules() if isinstance(module, OverRanks)]
    is_one = len(names) > 1 and all(name.startswith(f"{names[0]}.") for name in names[1:])
    return f", which has one as its part {names[0]}" if is_one else ""


def _ranks_of(op: str, mesh: Any) -> Ranks:
    if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
        must = "be one-dimensional, as one of its dimensions is: mesh[name]"
        raise ValueError(f"{op}: mesh must {must}, got mesh.ndim={mesh.ndim} (mesh_dim_names={mesh.mesh_dim_names})")
    if not isinstance(mesh, (DeviceMesh, dist.ProcessGroup, Ranks, type(None))):
        raise TypeError(f"{op}: mesh must be a one-dimensional DeviceMesh, a ProcessGroup or None, got mesh={mesh!r}")
    return ranks_of(op, mesh)


def _require_zero(name: str, value: float) -> None:
    if value > 0:
        must = "be 0 over ranks, where masks would differ, but for attention weights"
        raise ValueError(f"{OP}: dropout must {must}, got {name}={value}")
