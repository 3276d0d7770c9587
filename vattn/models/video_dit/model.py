"""A small video diffusion transformer, every frame of which has a timestep of its own.

    tokens      = patches of the noised frames + places + frames        (B, T, N, C)
    condition_t = MLP(waves(timestep of frame t)) + class               (B, T, C)
    F           = W LN(blocks(tokens, condition, text))                 see :class:`vattn.models.video_dit.Block`
    prediction  = F and the noised frames, as the timestep mixes them   see :mod:`vattn.models.video_dit.noise`

Diagonal denoising (:mod:`vattn.models.fifo`) asks for that: in its queue the first frame is nearly clean, and the last
one is noise. A model is trained for such a queue if every frame had noise of its own in training (`per_frame` of
:meth:`VideoDiT.training_loss`).

Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023); Chen et al., "Diffusion Forcing: Next-token
Prediction Meets Full-Sequence Diffusion" (NeurIPS 2024), on noise for every frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.checkpoints import PretrainedModel
from vattn.models.draws import Randomness, draws_of
from vattn.models.laps.frames import hidden_size, layer_leaps
from vattn.models.layers import reduction
from vattn.models.settings import number, probabilities
from vattn.models.video_dit.layers import WAVES, Block, modulated, places, waves
from vattn.models.video_dit.noise import Noising


class VideoDiT(PretrainedModel):
    """A denoiser of short videos, or of their latents, in which every frame has a timestep of its own.

    It is a `denoise` for :class:`vattn.models.fifo.FIFO` as it is. There is no official code of it, and so no
    `from_official`.

    Args:
        channels: of a frame, 3 for pixels.
        num_frames: T, of the videos that it is trained on and called with.
        size: height and width of a frame, or one number for both; multiples of `patch_size`.
        patch_size: height and width of what becomes a token.
        dim, depth, num_heads, mlp_ratio: of the blocks.
        levels: block i leaps ``T // 2**levels[i % len(levels)]`` frames, see :func:`vattn.nn.leap_of_level`; None is
            attention within each frame. Every block has attention along time, too.
        num_classes: of videos; None for a model without classes.
        text_dim: channels of embedded texts; None for a model that reads none.
        drop_conditions: how often the class and the text of a sample are hidden from it in training, which
            classifier-free guidance needs.
        prediction: "epsilon", the noise; "v", the velocity of Salimans and Ho; or "flow", noise minus video.
        num_timesteps: of training.
        betas: the first and the last one, between which their square roots are linear; flow has none.
        deviation: of the videos; pixels from -1 to 1 have about 0.5, scaled latents 1.

    Shape:
        noised videos ``(B, channels, T, height, width)`` and timesteps to predictions of the same shape. Timesteps are
        ``(B, T)``, ``(B,)`` for all frames of a sample, or one number for all; they are on the scale of the schedulers
        of diffusers, from 0, a clean video, to `num_timesteps`: flow has 1000 times the share of noise. `classes` are
        ``(B,)`` int64, `text` ``(B, words, text_dim)``, and `text_mask` ``(B, words)`` bool, which is False where there
        is no word. Without them, and where `hidden` ``(B,)`` bool is True, samples are of any class and text.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), on the blocks; Chen et al.,
        "Diffusion Forcing" (NeurIPS 2024), on a timestep for every frame.

    Example:
        >>> model = VideoDiT(3, num_frames=4, size=8, dim=32, depth=2, num_heads=2, num_classes=5)
        >>> video, classes = torch.randn(2, 3, 4, 8, 8), torch.tensor([4, 0])
        >>> model.training_loss(video, classes=classes, per_frame=True).backward()
        >>> model(video, timesteps=torch.tensor([[250, 500, 750, 999]]).expand(2, -1), classes=classes).shape
        torch.Size([2, 3, 4, 8, 8])
        >>> from vattn.models.video_dit import generate
        >>> generate(model.eval(), 2, classes=classes, num_steps=3, guidance_scale=2.0).shape
        torch.Size([2, 3, 4, 8, 8])
    """

    def __init__(
        self,
        channels: int = 3,
        num_frames: int = 16,
        size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        dim: int = 384,
        depth: int = 8,
        num_heads: int = 6,
        levels: Sequence[int | None] = (1, 2, 3, 1),
        *,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        text_dim: int | None = None,
        drop_conditions: float = 0.1,
        prediction: str = "v",
        num_timesteps: int = 1000,
        betas: tuple[float, float] = (0.00085, 0.012),
        deviation: float = 0.5,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        sizes: dict[str, Any] = {"channels": channels, "num_frames": num_frames, "patch_size": patch_size, "dim": dim}
        sizes |= {"depth": depth, "height": height, "width": width, "num_heads": num_heads}
        for name, value in sizes.items():
            _checks.integer("VideoDiT", name, value, least=1)
        for name, optional in (("num_classes", num_classes), ("text_dim", text_dim)):
            if optional is not None:
                _checks.integer("VideoDiT", name, optional, least=1)
        for name, side in (("height", height), ("width", width)):
            if side % patch_size:
                raise ValueError(f"VideoDiT: {name} must be a multiple of patch_size={patch_size}, got {name}={side}")
        number("VideoDiT", "mlp_ratio", mlp_ratio, 0, above=True)
        probabilities("VideoDiT", drop_conditions=drop_conditions)
        self.noising = Noising("VideoDiT", prediction, num_timesteps, betas, deviation)
        self.shape = (channels, num_frames, height, width)
        self.patch_size, self.num_classes, self.text_dim = patch_size, num_classes, text_dim
        self.drop_conditions = drop_conditions
        rows, columns = height // patch_size, width // patch_size
        self.patches = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.places = nn.Parameter(torch.empty(rows * columns, dim))
        self.frames = nn.Parameter(torch.empty(num_frames, 1, dim))
        self.timestep = nn.Sequential(nn.Linear(WAVES, dim), nn.SiLU(), nn.Linear(dim, dim))
        # The last class, and the last word, stand for any.
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        self.words = None if text_dim is None else nn.Linear(text_dim, dim)
        self.any_text = None if text_dim is None else nn.Parameter(torch.zeros(1, 1, dim))
        hidden, has_text = hidden_size(dim, mlp_ratio), text_dim is not None
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, hidden, num_frames, leap, reads_text=has_text)
            for leap in layer_leaps("VideoDiT", levels, depth, num_frames)
        )
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, channels * patch_size**2)
        with torch.no_grad():
            self.places.copy_(places(rows, columns, dim))
            self.frames.copy_(waves(torch.arange(num_frames, device="cpu"), dim, 100.0)[:, None])
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def num_frames(self) -> int:
        """T, and `frames` of a :class:`vattn.models.fifo.FIFO`."""
        return self.shape[1]

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Settings of a scheduler of diffusers under which this model denoises as it was trained.

        For flow they are those of `FlowMatchEulerDiscreteScheduler`; for the others of any scheduler that has betas.

        Example:
            >>> VideoDiT(3, 4, 8, dim=32, depth=1, num_heads=2).scheduler_settings["prediction_type"]
            'v_prediction'
        """
        return self.noising.scheduler_settings()

    _usage_imports = ("generate",)

    def _usage(self) -> str:
        return f"latents = generate(model, 1, num_steps=50)  # (1, {', '.join(map(str, self.shape))})"

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float,
        *,
        classes: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        self._require_video("VideoDiT", "latents", latents)
        dtype = self.places.dtype
        if latents.dtype != dtype and not torch.is_autocast_enabled(latents.device.type):
            raise TypeError(
                f"VideoDiT: latents must have the dtype of the model ({dtype}), got latents.dtype={latents.dtype}"
            )
        batch, (channels, num_frames, height, width) = latents.shape[0], self.shape
        steps = self._per_frame(timesteps, latents)
        size, scale, share = self._around(steps, latents)
        x = self.patches((latents / size).transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (batch, num_frames)) + self.places + self.frames
        condition = self.timestep(waves(steps, WAVES, 10000.0).to(x.dtype))  # (B, T, C)
        if hidden is not None and hidden.shape != (batch,):
            raise ValueError(f"VideoDiT: hidden must have shape ({batch},), got hidden.shape={tuple(hidden.shape)}")
        condition = condition + self._class(classes, hidden, batch)
        words, bias = self._text(text, text_mask, hidden, batch)
        condition = F.silu(condition)
        for block in self.blocks:
            x = block(x, condition, words, bias)
        x = self.head(modulated(x, *self.modulation(condition)[:, :, None].chunk(2, -1)))
        side = self.patch_size
        x = x.view(batch, num_frames, height // side, width // side, channels, side, side)
        return scale * x.permute(0, 4, 1, 2, 5, 3, 6).reshape(latents.shape) + share * latents

    def add_noise(self, video: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """A video ``(B, channels, T, height, width)`` with the share of `noise` that belongs to its timesteps.

        Example:
            >>> model = VideoDiT(3, 2, 8, dim=32, depth=1, num_heads=2, levels=(1,), prediction="flow")
            >>> video, noise = torch.zeros(1, 3, 2, 8, 8), torch.ones(1, 3, 2, 8, 8)
            >>> model.add_noise(video, noise, torch.tensor([[0.0, 750.0]]))[0, 0, :, 0, 0]
            tensor([0.0000, 0.7500])
        """
        self._require_video("VideoDiT.add_noise", "video", video)
        a, s = self._shares(self._per_frame(timesteps, video), video)
        return a * video + s * noise

    def training_loss(
        self,
        video: Tensor,
        *,
        classes: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        per_frame: bool = False,
        generator: Randomness = None,
    ) -> Tensor:
        """The mean squared error of the network for a video with noise that is drawn; 0 if B is 0.

        It is the squared error of the prediction over that of the best linear prediction at the same timestep: for a
        new model it is about 1, whatever the timestep and the kind of prediction.

        Args:
            video: clean ``(B, channels, T, height, width)``, of about the deviation that the model was made for.
            classes, text, text_mask: as in :meth:`forward`; both are hidden in as many samples as `drop_conditions`
                says, at random.
            per_frame: whether every frame draws a timestep of its own, which FIFO-Diffusion wants, rather than every
                sample. How far they are from each other is drawn for every sample: were they independent of each
                other, no window would ever be as noisy as those at the end of a queue are, or as a new clip is.
            generator: its seed decides timesteps, noise, and what is hidden.

        Raises:
            TypeError, ValueError: an input that does not fit.

        Source:
            Chen et al., "Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion" (NeurIPS 2024), on a
            timestep for every frame.
        """
        self._require_video("VideoDiT.training_loss", "video", video)
        draws, batch, device = draws_of(generator), video.shape[0], video.device
        steps = self.noising.draw(draws, batch, self.num_frames, per_frame, device)
        noise = draws.normal(*video.shape, device=device).to(video.dtype)
        hidden = None
        if self.classes is not None or self.words is not None:
            hidden = draws.uniforms(batch, device=device) < self.drop_conditions
        a, s = self._shares(steps, video)
        found = self(a * video + s * noise, steps, classes=classes, text=text, text_mask=text_mask, hidden=hidden)
        size = self._around(steps, video)[1]
        return F.mse_loss(found / size, self.noising.target(video, noise, a, s) / size, reduction=reduction(video))

    def extra_repr(self) -> str:
        noising = self.noising
        return (
            f"shape={self.shape}, patch_size={self.patch_size}, num_classes={self.num_classes}, "
            f"text_dim={self.text_dim}, drop_conditions={self.drop_conditions}, prediction={noising.prediction!r}, "
            f"num_timesteps={noising.num_timesteps}, betas={(noising.first_beta, noising.last_beta)}, "
            f"deviation={noising.deviation}"
        )

    def _require_video(self, op: str, name: str, video: Tensor) -> None:
        if not isinstance(video, Tensor) or not video.is_floating_point():
            got = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {name}={got}")
        if video.dim() != 5 or tuple(video.shape[1:]) != self.shape:
            channels, *rest = self.shape
            frames_first = video.dim() == 5 and tuple(video.shape[1:]) == (rest[0], channels, *rest[1:])
            hint = f"; that is (B, T, C, H, W), of which {name}.transpose(1, 2) has this order" if frames_first else ""
            raise ValueError(
                f"{op}: {name} must have shape (B, {', '.join(map(str, self.shape))}), "
                f"got {name}.shape={tuple(video.shape)}{hint}"
            )

    def _per_frame(self, timesteps: Tensor | float, video: Tensor) -> Tensor:
        """Timesteps ``(B, T)`` float32."""
        steps = torch.as_tensor(timesteps, device=video.device)
        if steps.dtype == torch.bool or steps.is_complex():
            raise TypeError(f"VideoDiT: timesteps must be real numbers, got timesteps.dtype={steps.dtype}")
        if steps.dim() == 1:
            steps = steps[:, None]
        sizes = (video.shape[0], self.num_frames)
        pairs = zip(steps.shape, sizes, strict=steps.dim() == 2)
        if steps.dim() > 2 or any(found != size and found != 1 for found, size in pairs):
            raise ValueError(
                f"VideoDiT: timesteps must be one number, or have shape ({sizes[0]},) or {sizes}, "
                f"got timesteps.shape={tuple(torch.as_tensor(timesteps).shape)}"
            )
        return steps.float().expand(sizes)

    def _shares(self, steps: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Of video and of noise in every frame, broadcastable to `video`."""
        a, s = (x[:, None, :, None, None].to(video.dtype) for x in self.noising.shares(steps))
        return a, s

    def _around(self, steps: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Noising.around`, of every frame, broadcastable to `video`."""
        size, scale, share = (
            x[:, None, :, None, None].to(video.dtype) for x in self.noising.around(*self.noising.shares(steps))
        )
        return size, scale, share

    def _class(self, classes: Tensor | None, hidden: Tensor | None, batch: int) -> Tensor | float:
        """The embedding of each sample's class ``(B, 1, C)``, which is the last one where there is none."""
        known = self.num_classes
        if self.classes is None or known is None:
            if classes is not None:
                raise ValueError("VideoDiT: classes must not be given to a model without them, got classes=a tensor")
            return 0.0
        any_class = self.classes.weight[known].expand(batch, -1)
        if classes is None:
            return any_class[:, None]
        if classes.shape != (batch,):
            raise ValueError(f"VideoDiT: classes must have shape ({batch},), got classes.shape={tuple(classes.shape)}")
        if classes.device.type == "cpu":  # a GPU would have to be waited for; there the lookup fails
            _checks.in_range("VideoDiT", "classes", classes, known)
        own = F.embedding(classes, self.classes.weight[:known])
        return own[:, None] if hidden is None else torch.where(hidden[:, None], any_class, own)[:, None]

    def _text(
        self, text: Tensor | None, mask: Tensor | None, hidden: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Words that are read ``(B, words, C)``, and the bias that hides some of them ``(B, 1, 1, words)``."""
        if self.words is None or self.any_text is None:
            if text is not None:
                raise ValueError("VideoDiT: text must not be given to a model without it, got text=a tensor")
            return None, None
        if not isinstance(text, Tensor | None):
            raise TypeError(f"VideoDiT: text must be a torch.Tensor, got text={type(text).__name__}")
        if text is None or text.shape[1] == 0:
            return self.any_text.expand(batch, -1, -1), None
        if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != self.text_dim:
            raise ValueError(
                f"VideoDiT: text must have shape ({batch}, words, {self.text_dim}), got text.shape={tuple(text.shape)}"
            )
        words, bias = self.words(text), None
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != text.shape[:2]:
                raise ValueError(
                    f"VideoDiT: text_mask must be bool, of shape {tuple(text.shape[:2])}, "
                    f"got text_mask of {mask.dtype}, of shape {tuple(mask.shape)}"
                )
            none = ~mask.any(1)
            hidden = none if hidden is None else hidden | none
            mask = mask | none[:, None]  # of equal words, as many as there are
            bias = torch.zeros_like(mask, dtype=words.dtype).masked_fill(~mask, -torch.inf)[:, None, None]
        if hidden is not None:
            words = torch.where(hidden[:, None, None], self.any_text, words)
        return words, bias
