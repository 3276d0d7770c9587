"""Small models of SViTT, and their inputs, for tests."""

from typing import Any

import torch
from torch import Tensor

from vattn.models.svitt import Sparsity, SViTT, TextEncoder, VideoEncoder

DENSE = Sparsity(num_random=None, keep=1.0)
SPARSE = Sparsity(block_size=3, num_random=1, keep=0.5, prune_after=(0,))
VIDEO: dict[str, Any] = {
    "image_size": (8, 12), "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "sparsity": SPARSE,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 30, "dim": 24, "depth": 3, "num_heads": 2, "mlp_dim": 32, "max_length": 9, "fusion_layer": 1,
    "video_dim": 16, "keep": 0.5, "prune_after": (1,), "dropout": 0.0,
}  # fmt: skip


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def randomize(model: Any) -> Any:
    """Weights that are all different, in evaluation mode."""
    generator = seed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def video_encoder(num_frames: int = 4, **settings: Any) -> VideoEncoder:
    return randomize(VideoEncoder(num_frames, **(VIDEO | settings)))


def text_encoder(**settings: Any) -> TextEncoder:
    return randomize(TextEncoder(**(TEXT | settings)))


def small_model(**settings: Any) -> SViTT:
    model = randomize(SViTT(video_encoder(**settings), text_encoder(), embed_dim=8, mask_id=29, never_masked=(0, 1)))
    model.temperature.data.fill_(0.2)
    return model


def random_video(batch: int = 2, num_frames: int = 4) -> Tensor:
    return torch.randn(batch, num_frames, 3, 8, 12, generator=seed(1))


def random_words(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(2, 29, (batch, length), generator=seed(2))
