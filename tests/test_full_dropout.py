"""Dropout of everything gives 0, not NaN: every setting that is a probability may be 1."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import svitt_models as svitt
from tests.model_zoo import MODELS


def mebt_loss(model: Any) -> Tensor:
    return model.training_loss(torch.zeros(2, 3, 2, 2, dtype=torch.int64))


def videogpt_loss(model: Any) -> Tensor:
    codes, classes = torch.zeros(2, 2, 4, 4, dtype=torch.int64), torch.tensor([0, 1])
    return model.training_loss(codes, classes=classes, frames=torch.zeros(2, 3, 1, 8, 8))


def dit_loss(model: Any) -> Tensor:
    return model.training_loss(torch.zeros(2, 2, 3, 4, 6), classes=torch.tensor([0, 1]), text=torch.zeros(2, 4, 5))


def encoder_loss(model: Any) -> Tensor:
    return model(svitt.random_video()).pooled.square().sum()


@pytest.mark.parametrize(
    "name, setting, loss",
    [
        *(("MeBT", name, mebt_loss) for name in ("embed_drop", "attn_drop", "proj_drop")),
        *(("VideoGPT", name, videogpt_loss) for name in ("dropout", "attn_drop")),
        ("VideoDiT", "drop_conditions", dit_loss),
        ("VideoEncoder", "drop_path", encoder_loss),
    ],
)
def test_probability_of_one(name: str, setting: str, loss: Callable[[Any], Tensor]) -> None:
    entry = MODELS[name]
    model = entry.kind(**{**entry.settings, setting: 1.0}).train()
    value = loss(model)
    value.backward()
    assert value.isfinite()
    assert all(bool(x.grad.isfinite().all()) for x in model.parameters() if x.grad is not None)
