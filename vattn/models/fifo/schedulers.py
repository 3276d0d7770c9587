"""Schedulers whose frames are at different noise levels.

Steps are numbered as diffusers numbers them: before step 0 a frame is noise, and after the last, step
``len(timesteps) - 1``, it is clean. The frames of a queue are one step apart.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Draws
from vattn.models.fifo.windows import Window
from vattn.models.settings import number

History = Mapping[str, Any]
"""What a scheduler remembers of the steps of one frame, by name."""


class FrameScheduler(ABC):
    """What a queue wants of a scheduler. A frame is ``(B, C, H, W)``, frames in a row are ``(B, C, L, H, W)``."""

    timesteps: Tensor
    """``(S,)``: what the denoiser is told, noisiest first."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What makes two schedulers the same one."""

    @abstractmethod
    def add_noise(self, frame: Tensor, noise: Tensor, step: int) -> Tensor:
        """A clean frame with the noise that there is before a step."""

    def enter(self, noise: Tensor) -> Tensor:
        """The frame that noise of variance 1 becomes at the noisy end."""
        return noise

    def history(self, step: int) -> History:
        """What there is to remember of a frame whose first step is this one."""
        return {}

    def model_input(self, latents: Tensor, steps: Sequence[int]) -> Tensor:
        """What the denoiser sees of frames before these steps."""
        return latents

    def draw(self, draws: Draws, windows: Sequence[Window], latents: Tensor) -> Tensor | None:
        """The noise of a step of the whole queue `latents`, unless :meth:`step` draws it frame by frame."""
        return None

    @abstractmethod
    def step(
        self,
        predictions: Tensor,
        latents: Tensor,
        steps: Sequence[int],
        histories: Sequence[History],
        noise: Tensor | None,
        draws: Draws,
    ) -> tuple[Tensor, list[History]]:
        """Frames after these steps, and their histories. What is given stays as it is."""


class OfficialDDIM(FrameScheduler):
    """DDIM as the code of FIFO-Diffusion has it; made by :func:`official_ddim`.

    Attributes:
        timesteps: ``(S,)`` int64, noisiest first.
        alphas, alphas_prev, sigmas, sqrt_one_minus_alphas: ``(S,)`` float64, in the order of `timesteps`.
    """

    def __init__(self, timesteps: Tensor, alphas_cumprod: Tensor, eta: float) -> None:
        self.timesteps, self.eta = timesteps, eta
        alphas = alphas_cumprod[timesteps]
        following = torch.cat([timesteps[1:], timesteps[-1:]])
        self.alphas, self.alphas_prev = alphas.double(), alphas_cumprod[following].double()
        # The official code rounds these two to the dtype of the table; float64 first, as float32's own sqrt may be off.
        rest = (1 - alphas).double()
        self.sqrt_one_minus_alphas, reciprocal = (x.to(alphas.dtype).double() for x in (rest.sqrt(), 1 / rest))
        self.sigmas = eta * ((1 - self.alphas_prev) * reciprocal * (1 - self.alphas / self.alphas_prev)).sqrt()

    def settings(self) -> dict[str, str]:
        return {"class": "official_ddim", "eta": str(self.eta), "timesteps": str(self.timesteps.tolist()),
                "alphas": str(self.alphas.tolist())}  # fmt: skip

    def add_noise(self, frame: Tensor, noise: Tensor, step: int) -> Tensor:
        alpha = self.alphas[step].item()
        return alpha**0.5 * frame + (1 - alpha) ** 0.5 * noise.to(frame.dtype)

    def draw(self, draws: Draws, windows: Sequence[Window], latents: Tensor) -> Tensor:
        """In the official order: window by window, also for frames that are read only, and without need of noise."""
        batch, channels, length, height, width = latents.shape
        noise: list[Tensor] = [latents[:, :, 0]] * length
        for start, write, stop in windows:
            for i in range(start, stop):
                drawn = draws.normal(batch, channels, height, width, device=latents.device)
                if i >= write:
                    noise[i] = drawn.to(latents.dtype)
        return torch.stack(noise, 2)

    def step(
        self,
        predictions: Tensor,
        latents: Tensor,
        steps: Sequence[int],
        histories: Sequence[History] = (),
        noise: Tensor | None = None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, list[History]]:
        """Frames ``(B, C, L, H, W)`` after their steps.

        Args:
            predictions: of the noise, like `latents`.
            latents: ``(B, C, L, H, W)``.
            steps: L numbers, 0 for the noisiest.
            histories: empty mappings: nothing is remembered.
            noise: like `latents`, of variance 1; not needed if `eta` is 0.
            draws: not used.
        """
        dtype = torch.promote_types(latents.dtype, torch.float32)

        def of(values: Tensor) -> Tensor:
            return values[list(steps)].to(latents.device, dtype)[:, None, None]

        sample, epsilon, alpha_prev, sigma = latents.to(dtype), predictions.to(dtype), of(self.alphas_prev), of(self.sigmas)
        clean = (sample - of(self.sqrt_one_minus_alphas) * epsilon) / of(self.alphas).sqrt()
        following = alpha_prev.sqrt() * clean + (1 - alpha_prev - sigma**2).sqrt() * epsilon
        if self.eta:
            following = following + sigma * noise.to(dtype)
        return following.to(latents.dtype), [{}] * len(steps)


def official_ddim(
    steps: int,
    *,
    eta: float = 1.0,
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    num_train_timesteps: int = 1000,
    alphas_cumprod: Tensor | None = None,
) -> OfficialDDIM:
    """The DDIM scheduler of FIFO-Diffusion's code, for denoisers that predict noise.

    Its timesteps are ``round(linspace(0, num_train_timesteps - 1, steps))``, so that the last step, whose timestep is
    0, changes nothing: frames leave with the noise of timestep 0 in them.

    Args:
        steps: ``frames * partitions`` of the queue.
        eta: how much noise a step adds: 0 none, 1 as much as DDPM.
        linear_start, linear_end: betas go from one to the other, linearly in their square roots; the defaults are those
            of VideoCrafter2, Stable Diffusion and Latte.
        num_train_timesteps: with how many timesteps the denoiser was trained.
        alphas_cumprod: ``(num_train_timesteps,)``, a denoiser's own products of ``1 - beta``, instead of these three.

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Source:
        Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), equation 12; Kim et al., "FIFO-Diffusion:
        Generating Infinite Videos from Text without Training" (NeurIPS 2024, arXiv:2405.11473), section 4.1.

    Example:
        >>> official_ddim(4, eta=0.0).timesteps
        tensor([999, 666, 333,   0])
    """
    op = "official_ddim"
    _checks.integer(op, "steps", steps, least=1)
    number(op, "eta", eta, 0, 1)
    if alphas_cumprod is None:
        _checks.integer(op, "num_train_timesteps", num_train_timesteps, least=1)
        number(op, "linear_start", linear_start, 0, 1)
        number(op, "linear_end", linear_end, 0, 1)
        roots = torch.linspace(linear_start**0.5, linear_end**0.5, num_train_timesteps, dtype=torch.float64)
        alphas_cumprod = (1 - roots**2).cumprod(0).float()
    else:
        _checks.tensor(op, "alphas_cumprod", alphas_cumprod)
        _checks.rank(op, "alphas_cumprod", alphas_cumprod, "(num_train_timesteps,)")
        alphas_cumprod = alphas_cumprod.detach().cpu()
    last = len(alphas_cumprod) - 1
    gap = last / (steps - 1) if steps > 1 else 0.0
    timesteps = [round(i * gap) for i in range(steps)]  # half to even, as NumPy rounds
    return OfficialDDIM(torch.tensor(timesteps[::-1]), alphas_cumprod, float(eta))
