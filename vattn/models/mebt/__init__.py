"""MeBT: the model, its masks, its training loss and its samplers.

    model.py     the transformer of latents, contexts and targets, and MeBT around it
    masks.py     which tokens are known: schedules, and partitions of the positions of a video
    training.py  what a training step is given, and its loss
    sampling.py  MaskGIT, draft and revise; generation, continuation, interpolation, inpainting
    longer.py    videos of any length, window by window

Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional Transformers"
(CVPR 2023).
"""

import torch

from vattn.models.draws import Draws
from vattn.models.mebt.longer import extend_video, stream_video
from vattn.models.mebt.masks import (
    SCHEDULES,
    Partition,
    complement,
    draft_partitions,
    frames_of,
    mask_ratio,
    next_partition,
    num_masked,
    revise_partitions,
    split_positions,
)
from vattn.models.mebt.model import OFFICIAL_MODES, LatentTransformer, MeBT
from vattn.models.mebt.sampling import (
    DECAYS,
    STRATEGIES,
    Logits,
    Sample,
    continue_video,
    draft,
    draft_and_revise,
    generate,
    inpaint,
    interpolate,
    maskgit,
    revise,
)
from vattn.models.mebt.training import PRIORS, draw_partition, frame_weights, masked_loss
from vattn.models.sampling import sample_tokens

__all__ = [
    "DECAYS",
    "OFFICIAL_MODES",
    "PRIORS",
    "SCHEDULES",
    "STRATEGIES",
    "Draws",
    "LatentTransformer",
    "Logits",
    "MeBT",
    "Partition",
    "Sample",
    "complement",
    "continue_video",
    "draft",
    "draft_and_revise",
    "draft_partitions",
    "draw_partition",
    "extend_video",
    "frame_weights",
    "frames_of",
    "generate",
    "inpaint",
    "interpolate",
    "mask_ratio",
    "masked_loss",
    "maskgit",
    "next_partition",
    "num_masked",
    "revise",
    "revise_partitions",
    "sample_tokens",
    "split_positions",
    "stream_video",
]

torch.serialization.add_safe_globals([Sample])
