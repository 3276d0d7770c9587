"""What holds for every model: nothing is drawn in evaluation, forwards do not get in each other's way, results last."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.model_losses import LOSSES
from tests.model_zoo import MODELS, assert_same
from tests.svitt_models import seed
from vattn.models import mebt, svitt, videogpt, vqvae
from vattn.models.vqvae import Tokenizer


def outputs(name: str, model: Any) -> list[Any]:
    """What the model itself gives in its loss, without a generator."""
    found: list[Any] = []
    loss_of, batch = LOSSES[name]
    handle = model.register_forward_hook(lambda _module, _inputs, given: found.append(given))
    loss_of(None, model, *batch)
    handle.remove()
    return found


def tensors(results: Any) -> list[Tensor]:
    return [x for x in tree_leaves(results) if isinstance(x, Tensor)]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_drawn_in_evaluation(name: str) -> None:
    model = MODELS[name].make()
    with torch.no_grad():
        first, second = (tensors(outputs(name, model)) for _ in range(2))
    assert first
    assert_same(second, first)


@pytest.mark.parametrize("name", ["VideoEncoder", "SViTT", "VideoAnswers"])
def test_something_is_drawn_in_training(name: str) -> None:
    model = MODELS[name].make().train()
    first, second = (tensors(outputs(name, model)) for _ in range(2))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_two_forwards_before_a_backward(name: str) -> None:
    """They give the sum of what each gives alone, from the same start."""
    (loss_of, batch), models = LOSSES[name], [MODELS[name].make() for _ in range(2)]
    for model in models:
        for module in model.modules():
            module.training = not isinstance(module, (torch.nn.Dropout, torch.nn.modules.batchnorm._BatchNorm))
            if isinstance(module, vqvae.Codebook):
                module.eval()  # in training the second forward finds other codes
    together = gradients(models[0], loss_of(seed(5), models[0], *batch) + loss_of(seed(6), models[0], *batch))
    alone = [gradients(models[1], loss_of(seed(i), models[1], *batch)) for i in (5, 6)]
    for key, grad in together.items():
        expected = alone[0][key] + alone[1][key]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["VQVAE", "VQGAN"])
def test_two_forwards_of_a_codebook_that_learns(name: str) -> None:
    (loss_of, batch), model = LOSSES[name], MODELS[name].make().train()
    assert isinstance(model, Tokenizer)
    found = gradients(model, loss_of(seed(5), model, *batch) + loss_of(seed(6), model, *batch))
    assert found and all(x.isfinite().all() for x in found.values())


def test_svitt_under_activation_checkpointing() -> None:
    (loss_of, batch), model = LOSSES["SViTT"], MODELS["SViTT"].make().train()
    model.temperature.data.fill_(0.7)  # beyond what is used
    torch.manual_seed(5)
    expected = gradients(model, loss_of(None, model, *batch))
    torch.manual_seed(5)
    again: Any = checkpoint(lambda *batch: loss_of(None, model, *batch), *batch, use_reentrant=False)
    torch.testing.assert_close(gradients(model, again), expected)


RESULTS: dict[str, Any] = {
    "svitt.Negatives": lambda: svitt.draw_negatives(torch.zeros(3, 3)),
    "svitt.Fused": lambda: svitt.Fused(torch.randn(1, 2, 4), (torch.arange(3)[None],)),
    "svitt.Ranking": lambda: svitt.Ranking(torch.arange(4)[None], torch.randn(1, 4), torch.randn(1, 2)),
    "svitt.Sparsity": lambda: svitt.Sparsity(keep=0.5),
    "mebt.Sample": lambda: mebt.Sample(*torch.zeros(3, 1, 4, dtype=torch.int64)),
    "videogpt.Decoding": lambda: videogpt.Decoding(
        1, None, [(torch.zeros(1), torch.ones(1)), None], [videogpt.KeyValueCache(4)]
    ),
}
"""What models give besides what their forwards do."""

LOAD = """
import sys, torch
from vattn.models import laps, mebt, svitt, videogpt, vqvae
print(*(type(x).__name__ for x in torch.load(sys.argv[1], weights_only=True).values()))
"""


def test_results_are_saved_and_loaded_without_pickle(tmp_path: Path) -> None:
    """In a process that has imported the packages they are of."""
    results = {name: make() for name, make in RESULTS.items()}
    with torch.no_grad():
        results |= {name: outputs(name, MODELS[name].make())[0] for name in MODELS}
    torch.save(results, tmp_path / "results.pt")
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert_same(tensors(found), tensors(results))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "results.pt")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [type(x).__name__ for x in results.values()]
