"""LAPS: an image classifier that sees a video, through leap attention and periodic shift alone.

    video (B, T, 3, H, W) -> B*T frames -> image model, attention within leap pairs -> mean of the T logits

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
Layer i leaps ``T // 2**levels[i % len(levels)]`` frames, so that a few layers connect all frames, without a
parameter more than the image model has::

    T = 8       pairs of frames                     frames that frame 0 depends on
    level 1     0-4  1-5  2-6  3-7                  4
    level 2     0-2  1-3  4-6  5-7                  4  2 6
    level 3     0-1  2-3  4-5  6-7                  4  2 6  1 5 3 7

:class:`LapsViT` and :class:`LapsVisformer` load the official checkpoints; :func:`video_from_image` turns any image ViT
of transformers or timm into a video model.
"""

from vattn.models.laps.from_image import VideoFromImage, video_from_image
from vattn.models.laps.visformer import LapsVisformer
from vattn.models.laps.vit import LapsViT

__all__ = ["LapsViT", "LapsVisformer", "VideoFromImage", "video_from_image"]
