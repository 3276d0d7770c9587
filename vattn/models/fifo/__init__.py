"""FIFO-Diffusion: a video of any length from a denoiser of short clips, in constant memory, without training.

    fifo.py         FIFO: the queue of frames, and how it moves
    windows.py      which frames are denoised together: latent partitioning and lookahead
    schedulers.py   how frames of different noise levels step: official_ddim
    per_frame.py    the same for schedulers of diffusers, of which each frame has a copy

Kim et al., "FIFO-Diffusion: Generating Infinite Videos from Text without Training" (NeurIPS 2024, arXiv:2405.11473).
"""

from vattn.models.fifo.fifo import FIFO
from vattn.models.fifo.per_frame import PerFrameScheduler
from vattn.models.fifo.schedulers import FrameScheduler, OfficialDDIM, official_ddim

__all__ = ["FIFO", "FrameScheduler", "OfficialDDIM", "PerFrameScheduler", "official_ddim"]
