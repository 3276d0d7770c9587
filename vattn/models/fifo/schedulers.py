"""Schedulers whose frames are at different noise levels.

Steps are numbered as diffusers numbers them: before step 0 a frame is noise, and after the last, step
``len(timesteps) - 1``, it is clean. The frames of a queue are one step apart.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """What a queue needs of a scheduler. A frame is ``(B, C, H, W)``, frames in a row are ``(B, C, L, H, W)``."""

    timesteps: Tensor
    """``(S,)``: what the denoiser is told, noisiest first."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What two schedulers must have in common for one to go on with frames of the other."""

    @abstractmethod
    def add_noise(self, frame: Tensor, noise: Tensor, step: int) -> Tensor:
        """A clean frame with the noise that there is before a step."""

    def enter(self, noise: Tensor) -> Tensor:
        """The frame that noise of variance 1 becomes at the noisy end."""
        return noise

    def history(self, step: int) -> History:
        """The history of a frame whose first step is this one."""
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
        alpha, dtype = self.alphas[step].item(), _compute_dtype(frame)
        return (alpha**0.5 * frame.to(dtype) + (1 - alpha) ** 0.5 * noise.to(dtype)).to(frame.dtype)

    def draw(self, draws: Draws, windows: Sequence[Window], latents: Tensor) -> Tensor:
        """In the official order: window by window, also for frames that are only read, and where `eta` is 0."""
        batch, channels, length, height, width = latents.shape
        noise: dict[int, Tensor] = {}
        for start, write, stop in windows:
            for i in range(start, stop):
                drawn = draws.normal(batch, channels, height, width, device=latents.device)
                if i >= write:
                    noise[i] = drawn
        return torch.stack([noise.get(i, drawn) for i in range(length)], 2)

    def clean(self, predictions: Tensor, latents: Tensor, steps: Sequence[int]) -> Tensor:
        """Clean frames, as predicted from frames ``(B, C, L, H, W)`` and their noise before these L steps."""
        dtype, of = _compute_dtype(latents), _coefficients(latents, steps)
        noise = of(self.sqrt_one_minus_alphas) * predictions.to(dtype)
        return (latents.to(dtype) - noise) / of(self.alphas.sqrt())

    def step(
        self,
        predictions: Tensor,
        latents: Tensor,
        steps: Sequence[int],
        histories: Sequence[History] = (),
        noise: Tensor | None = None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, list[History]]:
        """Frames after these steps, and histories, which are empty.

        Args:
            predictions: of the noise in `latents`, and like them.
            latents: ``(B, C, L, H, W)``.
            steps: L numbers of steps, 0 for the noisiest.
            histories: not used.
            noise: like `latents`, of variance 1; needed unless `eta` is 0.
            draws: not used.

        Raises:
            ValueError: there is no noise where it is needed.
        """
        if self.eta and noise is None:
            raise ValueError(f"OfficialDDIM.step: noise must be given unless eta is 0, got eta={self.eta}")
        dtype, of = _compute_dtype(latents), _coefficients(latents, steps)
        direction = of((1 - self.alphas_prev - self.sigmas**2).sqrt()) * predictions.to(dtype)
        after = of(self.alphas_prev.sqrt()) * self.clean(predictions, latents, steps) + direction
        if self.eta and noise is not None:
            after = after + of(self.sigmas) * noise.to(dtype)
        return after.to(latents.dtype), [{} for _ in steps]


def _compute_dtype(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)


def _coefficients(latents: Tensor, steps: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """From ``(S,)`` to what multiplies frames before these steps."""
    dtype, chosen = _compute_dtype(latents), list(steps)
    return lambda values: values[chosen].to(latents.device, dtype)[:, None, None]


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
        eta: how much noise a step adds: 0 none, 1 as much as DDPM does.
        linear_start, linear_end: betas go from one to the other, linearly in their square roots; the defaults are those
            of VideoCrafter2, Stable Diffusion and Latte.
        num_train_timesteps: with how many timesteps the denoiser was trained.
        alphas_cumprod: ``(num_train_timesteps,)``, a denoiser's own products of ``1 - beta``, instead of these three:
            above 0, below 1, and none greater than the one before.

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Source:
        Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), equation 12; Kim et al., "FIFO-Diffusion:
        Generating Infinite Videos from Text without Training" (NeurIPS 2024, arXiv:2405.11473), section 3.1.

    Example:
        >>> official_ddim(4, eta=0.0).timesteps
        tensor([999, 666, 333,   0])
    """
    op = "official_ddim"
    _checks.integer(op, "steps", steps, least=1)
    number(op, "eta", eta, 0)
    if alphas_cumprod is None:
        _checks.integer(op, "num_train_timesteps", num_train_timesteps, least=1)
        number(op, "linear_start", linear_start, 0, 1)
        number(op, "linear_end", linear_end, 0, 1)
        ends = linear_start**0.5, linear_end**0.5
        roots = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64, device="cpu")
        alphas_cumprod = (1 - roots**2).cumprod(0).float()
    else:
        _checks.tensor(op, "alphas_cumprod", alphas_cumprod, meshes=False)
        _checks.rank(op, "alphas_cumprod", alphas_cumprod, "(num_train_timesteps)")
        alphas_cumprod = alphas_cumprod.detach().cpu()
    if not len(alphas_cumprod) or not ((0 < alphas_cumprod) & (alphas_cumprod < 1)).all():
        values = f"from {alphas_cumprod.min()} to {alphas_cumprod.max()}" if len(alphas_cumprod) else "none"
        raise ValueError(
            f"{op}: alphas_cumprod, given or of linear_start and linear_end, must be above 0 and below 1, got {values}"
        )
    if (alphas_cumprod.diff() > 0).any():
        raise ValueError(
            f"{op}: alphas_cumprod must not grow with the timestep, got alphas_cumprod[0]={alphas_cumprod[0]} and "
            f"alphas_cumprod[-1]={alphas_cumprod[-1]}"
        )
    last = len(alphas_cumprod) - 1
    gap = last / (steps - 1) if steps > 1 else 0.0
    timesteps = [round(i * gap) for i in range(steps)]  # half to even, as NumPy rounds
    scheduler = OfficialDDIM(torch.tensor(timesteps[::-1], device="cpu"), alphas_cumprod, float(eta))
    if (scheduler.sigmas**2 > 1 - scheduler.alphas_prev).any():
        raise ValueError(f"{op}: eta must add no more noise than there is after a step, got eta={eta}")
    return scheduler
