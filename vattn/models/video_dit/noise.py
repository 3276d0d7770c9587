"""How a video is noised, and what a model may predict of it.

    x_t = a_t x_0 + s_t e        x_0: the video, e: noise of the normal distribution, t: the timestep

    prediction   a_t               s_t                  the model predicts
    epsilon      sqrt(abar_t)      sqrt(1 - abar_t)     e
    v            sqrt(abar_t)      sqrt(1 - abar_t)     a_t e - s_t x_0
    flow         1 - t / N         t / N                e - x_0

N is the number of timesteps of training, abar_t the product of ``1 - beta_i`` over i up to t, and the square root of
beta is linear in t. Timesteps and signs are those of the schedulers of diffusers (``prediction_type`` "epsilon" and
"v_prediction", ``beta_schedule`` "scaled_linear"; for flow `FlowMatchEulerDiscreteScheduler`). Epsilon, with the betas
that are the default, is what VideoCrafter2 has, with which the official FIFO-Diffusion runs.

The network F of a model has variance 1 as its input, and is to give what has variance 1. Of a video of deviation d, a
multiple of x_t is the best linear prediction, and F predicts the rest::

    p e + q x_0 = (p s_t + q a_t d**2) / c**2 x_t + d abs(p a_t - q s_t) / c F(x_t / c),   c**2 = (a_t d)**2 + s_t**2

Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020); Salimans and Ho, "Progressive Distillation for
Fast Sampling of Diffusion Models" (ICLR 2022), on v; Lipman et al., "Flow Matching for Generative Modeling" (2023);
Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NeurIPS 2022), appendix B.6, on F.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Draws
from vattn.models.settings import number
from vattn.models.tables import Table

PREDICTIONS = ("epsilon", "v", "flow")
"""What a :class:`VideoDiT` may predict."""


class Noising:
    """The share of video and of noise at every timestep, and what a model predicts there.

    Args:
        op: for messages.
        prediction: one of ``PREDICTIONS``.
        num_timesteps: N.
        betas: the first and the last one; flow has none.
        deviation: d.

    Raises:
        TypeError, ValueError: a setting that does not fit.
    """

    def __init__(self, op: str, prediction: str, num_timesteps: int, betas: Sequence[float], deviation: float) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"{op}: prediction must be one of {', '.join(PREDICTIONS)}, got prediction={prediction!r}")
        _checks.integer(op, "num_timesteps", num_timesteps, least=1)
        if len(betas) != 2:
            raise ValueError(f"{op}: betas must be the first and the last one, got betas={betas!r}")
        for beta in betas:
            number(op, "betas", beta, 0, 0.999)
        number(op, "deviation", deviation, 0, above=True)
        self.prediction, self.num_timesteps, self.deviation = prediction, num_timesteps, deviation
        self.first_beta, self.last_beta = betas
        roots = torch.linspace(
            self.first_beta**0.5, self.last_beta**0.5, num_timesteps, dtype=torch.float64, device="cpu"
        )
        abar = (1 - roots.square()).cumprod(0).float()
        if prediction == "epsilon" and abar[-1] == 0:
            raise ValueError(f"{op}: betas must leave some of the video, which epsilon needs, got betas={betas!r}")
        self._abar = Table(abar)

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, float32, of the shape of `timesteps`."""
        if self.prediction == "flow":
            noise = timesteps.float() / self.num_timesteps
            return 1 - noise, noise
        abar = self._abar.on(timesteps.device)[timesteps.round().long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def draw(self, draws: Draws, batch: int, frames: int, per_frame: bool, device: torch.device) -> Tensor:
        """Timesteps to train on, ``(batch, frames)``, all as likely: float32, whole numbers but for flow.

        A sample draws one, and with `per_frame` also how far from it its frames are at most, each of which draws a
        distance, up or down. What would leave the range is reflected, so that all timesteps stay as likely.
        """
        levels = draws.uniforms(batch, 1, device=device)
        if per_frame:
            farthest = draws.uniforms(batch, 1, device=device)
            levels = levels + farthest * (2 * draws.uniforms(batch, frames, device=device) - 1)
            levels = 1 - (1 - levels.remainder(2)).abs()
        timesteps = (self.num_timesteps * levels).expand(-1, frames)
        return timesteps if self.prediction == "flow" else timesteps.floor().clamp(max=self.num_timesteps - 1)

    def target(self, video: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """What a model predicts of a video and its noise, whose shares are `a` and `s`."""
        p, q = self._parts(a, s)
        return p * noise + q * video

    def around(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a network's input is divided by, what its output is multiplied with, and the share of x_t beside it."""
        p, q = self._parts(a, s)
        square = (a * self.deviation).square() + s.square()
        size = square.sqrt()
        return size, self.deviation * (p * a - q * s).abs() / size, (p * s + q * a * self.deviation**2) / square

    def _parts(self, a: Tensor, s: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """p and q of what is predicted, ``p e + q x_0``."""
        if self.prediction == "v":
            return a, -s
        return 1.0, -1.0 if self.prediction == "flow" else 0.0

    def split(self, noised: Tensor, predicted: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The video and the noise that a prediction says a noised video is made of."""
        if self.prediction == "flow":
            return noised - s * predicted, noised + a * predicted
        if self.prediction == "epsilon":
            return (noised - s * predicted) / a, predicted
        return a * noised - s * predicted, s * noised + a * predicted

    def path(self, num_steps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps ``(num_steps,)`` from pure noise on; a and s ``(num_steps + 1,)``, the last of no noise."""
        first = self.num_timesteps if self.prediction == "flow" else self.num_timesteps - 1
        last = first / num_steps if self.prediction == "flow" else 0
        timesteps = torch.linspace(first, last, num_steps, dtype=torch.float32, device="cpu")
        timesteps = timesteps if self.prediction == "flow" else timesteps.round()
        a, s = self.shares(timesteps)
        a, s = F.pad(a, (0, 1), value=1.0), F.pad(s, (0, 1))
        return timesteps.to(device), a.to(device), s.to(device)

    def scheduler_settings(self) -> dict[str, Any]:
        """Of a scheduler of diffusers that agrees with all this."""
        if self.prediction == "flow":
            return {"num_train_timesteps": self.num_timesteps}
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.first_beta,
            "beta_end": self.last_beta,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon" if self.prediction == "epsilon" else "v_prediction",
        }
