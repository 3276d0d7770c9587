"""The six transformers of diffusers that FIFO adapts, tiny and random, and how each is called with one timestep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TEXT = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8).sin()
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def configuration(**values: Any) -> dict[str, Any]:
    """Values by name, as a class of diffusers takes them."""
    return values


@dataclass
class Case:
    """One class: its tiny configuration, its conditions, and a call of its own as its pipeline makes it."""

    name: str
    config: dict[str, Any]
    scalar_call: Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Tensor]
    conditions: dict[str, Any] = field(default_factory=lambda: {"encoder_hidden_states": TEXT})

    def model(self, **overrides: Any) -> Any:
        torch.manual_seed(0)
        return getattr(diffusers, self.name)(**{**self.config, **overrides}).eval()


def plain_call(model: nn.Module, latents: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
    return model(hidden_states=latents, timestep=timestep, **conditions).sample


def ltx_call(model: nn.Module, latents: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
    _, _, frames, height, width = latents.shape
    tokens = latents.flatten(2).transpose(1, 2)  # patches of one latent, as the released weights have them
    size = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (8 / 25, 32, 32)}
    out = model(hidden_states=tokens, timestep=timestep, **size, **conditions).sample
    return out.transpose(1, 2).unflatten(2, (frames, height, width))


def anyflow_call(model: nn.Module, latents: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
    timesteps = timestep[:, None].repeat(1, latents.shape[2])
    out = model(hidden_states=latents.transpose(1, 2), timestep=timesteps, r_timestep=timesteps, **conditions).sample
    return out.transpose(1, 2)


WAN = configuration(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, text_dim=8, freq_dim=8,
    ffn_dim=16,
)  # fmt: skip
SANA = configuration(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, mlp_ratio=2.0,
    num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
)  # fmt: skip
COSMOS = configuration(
    num_attention_heads=2, attention_head_dim=18, in_channels=4, out_channels=4, num_layers=1, mlp_ratio=2.0,
    text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 8, 12), concat_padding_mask=False,
)  # fmt: skip
LTX = configuration(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24,
    caption_channels=8,
)  # fmt: skip
MASKED = {"encoder_hidden_states": TEXT, "encoder_attention_mask": TEXT_MASK}

CASES = {
    case.name: case
    for case in (
        Case("AnyFlowTransformer3DModel", WAN, anyflow_call),
        Case("CosmosTransformer3DModel", COSMOS, plain_call, {"encoder_hidden_states": TEXT, "fps": 30}),
        Case("LTXVideoTransformer3DModel", LTX, ltx_call, MASKED),
        Case("SanaVideoTransformer3DModel", SANA, plain_call, MASKED),
        Case("SkyReelsV2Transformer3DModel", WAN, plain_call),
        Case("WanTransformer3DModel", WAN, plain_call),
    )
}


def of_one_sample(conditions: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in conditions.items()}


def without_mixing(model: nn.Module) -> nn.Module:
    """`model` with weights of 0 wherever frames would meet: what is left of a timestep is what modulates its frame."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("to_out.0", "conv_temp")):
                for weight in module.parameters():
                    weight.zero_()
    return model
