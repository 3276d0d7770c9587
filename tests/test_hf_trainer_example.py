"""The example with Hugging Face's Trainer trains, saves, loads and evaluates a model whose attention leaps."""

import json
import shutil

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer of transformers needs accelerate")

from examples import hf_trainer
from vattn.integrations.transformers import LeapOfLayer


@pytest.mark.slow
def test_three_steps(videos, tmp_path, capsys):
    assert hf_trainer.main(["--videos", str(videos), "--steps", "3", "--size", "32", "--outputs", str(tmp_path)]) == 0
    assert "held-out windows" in capsys.readouterr().out
    config = json.loads((tmp_path / "hf_trainer" / "config.json").read_text())
    assert config["vattn_leap"] == {"num_frames": None, "levels": [1, 2, 3, 1], "group_size": 2, "fold_div": 4}
    assert (tmp_path / "hf_trainer" / "model.safetensors").stat().st_size > 0


def test_one_video_is_refused(videos, tmp_path, capsys):
    shutil.copy(videos / "left.mp4", tmp_path)
    with pytest.raises(SystemExit):
        hf_trainer.main(["--videos", str(tmp_path), "--size", "32", "--outputs", str(tmp_path / "outputs")])
    assert "--videos must have two videos of 64 frames or more" in capsys.readouterr().err


def test_windows():
    windows = hf_trainer.Windows([torch.arange(n).view(n, 1, 1, 1) for n in (16, 24)], every=4)
    assert [(w["labels"], w["pixel_values"][0].item()) for w in windows] == [
        (0, 0), (1, 0), (1, 4), (1, 8),
    ]  # fmt: skip
    assert windows[0]["pixel_values"].flatten().tolist() == list(range(16))


def test_layers_leap():
    model = hf_trainer.video_model(32, 2)
    assert [part.leap for part in model.modules() if isinstance(part, LeapOfLayer)] == [4, 2, 1, 4]
    with torch.no_grad():
        out = model(torch.randn(1, 16, 3, 32, 32), labels=torch.tensor([1]))
    assert out.loss.isfinite() and out.logits.shape == (1, 2)
