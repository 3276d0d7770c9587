"""ONNX: what ``torch.onnx.export`` writes inside of ``vattn.use_reference`` gives what the model gives."""

import pathlib
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vattn
from tests.programs import Program
from vattn.models.laps import LapsVisformer
from vattn.models.vqvae import VQGAN, VQVAE

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = pathlib.Path(__file__).parents[1]
LAPS: dict[str, Any] = {"num_frames": 2, "fold_div": 2, "num_classes": 3, "embed_dim": 8, "num_heads": 2}
TOKENIZER: dict[str, Any] = {"num_codes": 300, "code_dim": 4, "hidden": 4, "downsample": (1, 2, 2)}


def video(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def codes(batch: int) -> Tensor:
    return torch.randint(300, (batch, 2, 4, 4))


def encode(model: Any, x: Tensor) -> Any:
    return model.encode(x)


def decode(model: Any, x: Tensor) -> Any:
    return model.decode(x)


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Callable[..., Any]]] = {
    "LapsVisformer": (
        lambda: LapsVisformer(**LAPS, levels=((1,), (None,)), image_size=32, stem_channels=4, depth=(1, 1, 1)),
        video(2, 3, 32, 32),
        nn.Module.__call__,
    ),
    "VQVAE.encode": (lambda: VQVAE(**TOKENIZER, num_blocks=1), video(3, 2, 8, 8), encode),
    "VQVAE.decode": (lambda: VQVAE(**TOKENIZER, num_blocks=1), codes, decode),
    "VQGAN.encode": (lambda: VQGAN(**TOKENIZER, groups=2), video(3, 2, 8, 8), encode),
    "VQGAN.decode": (lambda: VQGAN(**TOKENIZER, groups=2), codes, decode),
}


def export(program: nn.Module, example: Tensor, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own exporter
        return torch.onnx.export(program, (example,), dynamo=True, verbose=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_models(name):
    """For another batch than that of the example."""
    torch.manual_seed(0)
    make, inputs, call = PROGRAMS[name]
    program = Program(make(), call).eval()
    with vattn.use_reference():
        exported = export(program, inputs(2), dynamic_shapes=(({0: torch.export.Dim("batch", min=1, max=64)},),))
    assert not any("vattn" in node.domain for node in exported.model.graph)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    for batch in (2, 5):
        x = inputs(batch)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = tree_leaves(program(x))
        assert len(found) == len(expected)
        for y, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), truth.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_page():
    """A LapsViT, by the programs of docs/export.md, for another batch than that of the example."""
    part = (ROOT / "docs" / "export.md").read_text().partition("## `.pt2`")[0]
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program in re.findall(r"```py(?:thon)?\n(.*?)```", part, re.DOTALL):
            exec(program, names)
    shutil.rmtree(names["folder"])
    x = torch.randn(2, 2, 3, 8, 8)
    (found,) = names["session"].run(None, {names["session"].get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), names["model"](x).detach(), rtol=1e-5, atol=1e-5)


def test_without_it_the_operator_is_named():
    """Which kernels have no counterpart in ONNX."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return vattn.leap_attention(x, x, x, 1)

    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        export(Attention(), torch.randn(1, 1, 2, 2, 4))
    assert "vattn.leap_attention" in str(error.value)
