"""What is not finite, in models: a fault of a weight shows in what the model gives."""

import pytest
import torch

from tests.model_zoo import MODELS

# Of MeBT, the latents of the last block that writes them are read by nobody.
EVERY_LAYER_COUNTS = ["LapsViT", "VideoGPT", "VideoEncoder", "TextEncoder", "VideoDiT"]


@pytest.mark.parametrize("name", EVERY_LAYER_COUNTS)
def test_a_weight_that_is_nan_shows(name):
    """Also one of a query or of a key, which reach the output by their softmax alone."""
    entry = MODELS[name]
    model = entry.make()
    layers = {place: layer for place, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for place, layer in layers.items():
        weight = layer.weight.detach()
        kept = weight[0].clone()
        weight[0] = torch.nan
        outputs = [x for x in entry.outputs(model) if x.is_floating_point()]
        weight[0] = kept
        assert any(x.isnan().any() for x in outputs), f"{place} is NaN, and what {name} gives is finite"
