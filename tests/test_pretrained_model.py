"""What a class gets from PretrainedModel: its settings, shared weights and buffers, and what is refused to be saved."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model_zoo import MODELS, assert_same, randomize
from tests.svitt_models import SPARSE, random_video, seed, small_model
from vattn.models.checkpoints import PretrainedModel
from vattn.models.laps import LapsViT, VideoFromImage
from vattn.models.svitt import Sparsity, SViTT, VideoEncoder, expand

safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = pathlib.Path(__file__).parents[1]


class Part(PretrainedModel):
    order: Tensor

    def __init__(self, dim: int, sizes: tuple[int | None, ...] = (1, None)) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("order", torch.arange(dim, device="cpu"), persistent=False)


class Whole(PretrainedModel):
    """What no model here has all of: shared weights, a part that may not be there, any further settings."""

    part: Part | None

    def __init__(self, part: dict[str, Any] | None = None, rate: float = 0.5) -> None:
        super().__init__()
        self.part = None if part is None else Part(**part)
        self.word, self.head, self.drop = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False), nn.Dropout(rate)
        self.head.weight = self.word.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


class Loose(PretrainedModel):
    def __init__(self, **settings: int) -> None:
        super().__init__()


class TestPretrainedModel:
    """What subclasses may do."""

    def test_shared_weights_stay_shared(self, tmp_path: pathlib.Path) -> None:
        model = Whole({"dim": 2})
        model.save_pretrained(tmp_path)
        assert "head.weight" not in safetensors_torch.load_file(tmp_path / "model.safetensors")
        loaded = Whole.from_pretrained(tmp_path)
        assert loaded.head.weight is loaded.word.weight
        assert_same(loaded.state_dict(), model.state_dict())

    def test_views_of_one_storage(self, tmp_path: pathlib.Path) -> None:
        model, storage = Whole({"dim": 2}), torch.randn(12)
        assert model.part is not None
        model.part.linear.weight.data = storage[:4].view(2, 2).T
        model.part.linear.bias.data = storage[3:5]
        model.save_pretrained(tmp_path)
        assert_same(Whole.from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_buffers_that_are_not_saved(self, tmp_path: pathlib.Path) -> None:
        Part(3).save_pretrained(tmp_path)
        assert Part.from_pretrained(tmp_path).order.tolist() == [0, 1, 2]

    def test_buffers_without_a_device_are_noticed(self, tmp_path: pathlib.Path) -> None:
        class Careless(PretrainedModel):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(1, 1)
                self.register_buffer("order", torch.arange(3), persistent=False)

        Careless().save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match=r"^Careless: order is not saved, and must be made on a named device$"):
            Careless.from_pretrained(tmp_path)

    def test_settings_of_parts_are_those_of_their_constructors(self, tmp_path: pathlib.Path) -> None:
        Whole({"dim": 2}).save_pretrained(tmp_path)
        for part, error, message in (
            ({"dim": "2"}, TypeError, "part.dim must be int, got part.dim='2'"),
            ({"dim": True}, TypeError, "part.dim must be int, got part.dim=True"),
            (
                {"dim": 2, "sizes": [1.5]},
                TypeError,
                r"part.sizes must be .*, got part.sizes=\[1.5\]",
            ),
            ({"sizes": [1]}, ValueError, "settings must have part.dim, got sizes"),
        ):
            config = json.loads((tmp_path / "config.json").read_text())
            config["settings"]["part"] = part
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(error, match=f"^Whole.from_pretrained: {message}$"):
                Whole.from_pretrained(tmp_path)

    def test_settings_of_any_name(self, tmp_path: pathlib.Path) -> None:
        Loose(a=1, b=2).save_pretrained(tmp_path)
        assert Loose.from_pretrained(tmp_path, b=3).config == {"a": 1, "b": 3}

    def test_a_subclass_has_settings_of_its_own(self, tmp_path: pathlib.Path) -> None:
        class Small(LapsViT):
            def __init__(self, width: int) -> None:
                super().__init__(2, (1,), image_size=8, patch_size=4, embed_dim=width, depth=1, num_heads=2)

        model = randomize(Small(8))
        assert model.config == {"width": 8}
        model.save_pretrained(tmp_path)
        assert_same(Small.from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_types_that_are_not_known(self, tmp_path: pathlib.Path) -> None:
        class Later(PretrainedModel):
            def __init__(self, size: "Unknown" = 1) -> None:  # type: ignore[name-defined]  # noqa: F821
                super().__init__()

        Later(2).save_pretrained(tmp_path)
        assert Later.from_pretrained(tmp_path).config == {"size": 2}

    @pytest.mark.parametrize("value", [torch.zeros(2), nn.Linear(1, 1), object(), b"bytes", {1: 2}, [torch.zeros(1)]])
    def test_settings_that_are_not_plain_are_refused(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^Loose: a must (be a plain value .*|have strings as keys), got "):
            Loose(a=value)

    def test_a_wrong_call_is_explained_by_python(self) -> None:
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'dim'"):
            Part()  # type: ignore[call-arg]

    def test_safetensors_is_asked_for(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in [name for name in sys.modules if name.startswith("safetensors")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"^Part.save_pretrained: .* install vattn with the extra 'models'$"):
            Part(1).save_pretrained(tmp_path)
        with pytest.raises(ImportError, match=r"^Part.from_pretrained: .* install vattn with the extra 'models'$"):
            Part.from_pretrained(tmp_path)

    @pytest.mark.slow
    def test_models_are_imported_without_it(self) -> None:
        code = "import sys; sys.modules |= {'safetensors': None, 'huggingface_hub': None}; "
        code += "import vattn.models.laps, vattn.models.mebt, vattn.models.svitt, vattn.models.videogpt"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestSaving:
    """What is refused, and what an interruption leaves."""

    @pytest.mark.parametrize(
        "change, message",
        [
            pytest.param(lambda m: setattr(m.text, "drop", nn.Dropout(0.3)), "text.drop must .*p=0.3", id="layer"),
            pytest.param(lambda m: setattr(m, "word_head", None), "word_head must .*word_head=nothing", id="none"),
            pytest.param(lambda m: m.add_module("more", nn.Identity()), r"more must be .*, got more=Ident", id="more"),
            pytest.param(lambda m: setattr(m.text, "keep", 0.1), r"text must be .*, got .*keep=0.1", id="setting"),
            pytest.param(
                lambda m: setattr(m.video.blocks[1].attn, "pad_keys", "zero"), "video.blocks.1.attn must ", id="deep"
            ),
            pytest.param(
                lambda m: setattr(m.text.word, "weight", nn.Parameter(torch.zeros(31, 24))), "text.word.weight must ",
                id="weight",
            ),
            pytest.param(lambda m: m.to("meta"), r"weights must have storage, got temperature.device=meta", id="meta"),
        ],
    )  # fmt: skip
    def test_what_its_settings_do_not_make(self, change: Any, message: str, tmp_path: pathlib.Path) -> None:
        model = small_model()
        change(model)
        with pytest.raises(ValueError, match=f"^SViTT.save_pretrained: {message}"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("replaced", [0, 1])
    def test_half_a_model_does_not_load(
        self, replaced: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Any] = []
        replace = os.replace
        MODELS["LapsViT"].make().save_pretrained(tmp_path)

        def interrupted(*paths: Any) -> None:
            if len(calls) == replaced:
                raise KeyboardInterrupt
            calls.append(paths)
            replace(*paths)

        monkeypatch.setattr(os, "replace", interrupted)
        settings = {**MODELS["LapsViT"].settings, "fold_div": 0}  # of the same shapes, but not the same model
        with pytest.raises(KeyboardInterrupt):
            LapsViT(**settings).save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["README.md", "model.safetensors"]
        with pytest.raises(FileNotFoundError, match=r"^LapsViT.from_pretrained: folder must hold config.json"):
            LapsViT.from_pretrained(tmp_path)

    def test_an_expanded_model(self, tmp_path: pathlib.Path) -> None:
        model = small_model()
        longer = expand(model, 8, Sparsity(3, num_random=1, keep=0.25, prune_after=(1,)))
        assert (model.config["video"]["num_frames"], longer.config["video"]["num_frames"]) == (4, 8)
        assert longer.config["video"]["sparsity"]["keep"] == 0.25
        longer.save_pretrained(tmp_path)
        loaded, video = SViTT.from_pretrained(tmp_path), random_video(num_frames=8)
        assert_same(loaded.encode_video(video, generator=seed())[:2], longer.encode_video(video, generator=seed())[:2])
        encoder = expand(loaded, 4, SPARSE).video
        encoder.save_pretrained(tmp_path)  # also alone
        assert VideoEncoder.from_pretrained(tmp_path).config == encoder.config

    def test_a_part_is_a_model(self, tmp_path: pathlib.Path) -> None:
        model = small_model()
        model.video.save_pretrained(tmp_path)
        assert_same(VideoEncoder.from_pretrained(tmp_path).state_dict(), model.video.state_dict())

    def test_a_model_around_a_foreign_one_is_not_ours_to_save(self) -> None:
        assert not issubclass(VideoFromImage, PretrainedModel)
