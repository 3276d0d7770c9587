"""Every model is saved and loaded in one form: in another process, bitwise, without pickle; and no other file loads."""

import copy
import inspect
import json
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model_zoo import MODELS, assert_same
from tests.svitt_models import SPARSE
from vattn.models.laps import LapsViT
from vattn.models.svitt import SViTT, VideoEncoder

safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Tensor]]:
    """What each model gives in a process that has loaded it."""
    folder = tmp_path_factory.mktemp("models")
    for name, entry in MODELS.items():
        entry.make().save_pretrained(folder / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "tests.model_zoo", folder], cwd=ROOT, env=environment, check=True)

    def outputs(name: str) -> list[Tensor]:
        found = safetensors_torch.load_file(folder / f"{name}.outputs")
        return [found[str(i)] for i in range(len(found))]

    return outputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], pathlib.Path]]:
    """A folder of each model, which is copied where a test changes it."""
    made: dict[str, pathlib.Path] = {}

    def folder(name: str) -> pathlib.Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            MODELS[name].make().save_pretrained(made[name])
        copied = tmp_path_factory.mktemp(f"{name}-copy")
        for path in made[name].iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        return copied

    yield folder


class TestEveryModel:
    """Settings and weights, there and back."""

    @pytest.mark.slow
    def test_another_process_gives_the_same(self, name: str, elsewhere: Any) -> None:
        entry = MODELS[name]
        assert_same(elsewhere(name), entry.outputs(entry.make()))

    def test_official_checkpoints_are_asked_for_in_one_way(self, name: str) -> None:
        if MODELS[name].official is None:
            pytest.skip("no official code")
        arguments = inspect.signature(MODELS[name].kind.from_official).parameters.values()
        assert [argument.name for argument in arguments] == ["state_dict", "config", "overrides"]
        assert [argument.default for argument in arguments][1] is None

    def test_official_to_saved_to_loaded(self, name: str, tmp_path: pathlib.Path) -> None:
        entry = MODELS[name]
        if entry.official is None:
            pytest.skip("no official code")
        made = entry.make()
        official = entry.official(made)
        model = entry.kind.from_official(official.state_dict, official.config, **official.overrides)
        assert_same(model.state_dict(), made.state_dict())
        model.save_pretrained(tmp_path)
        loaded = entry.kind.from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert_same(loaded.state_dict(), model.state_dict())
        assert_same(entry.outputs(loaded), entry.outputs(model))

    def test_loading_keeps_what_it_should(self, name: str, folders: Any) -> None:
        """Settings, weights, which of them are trained, evaluation mode, and the state of the global generator."""
        made, folder, state = MODELS[name].make(), folders(name), torch.get_rng_state()
        loaded = MODELS[name].kind.from_pretrained(folder)
        assert torch.equal(torch.get_rng_state(), state)  # no weights were drawn
        assert loaded.config == made.config
        assert_same(loaded.state_dict(), made.state_dict())
        assert not any(module.training for module in loaded.modules())
        assert [x.requires_grad for x in loaded.parameters()] == [x.requires_grad for x in made.parameters()]
        assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))
        assert [type(module) for module in loaded.modules()] == [type(module) for module in made.modules()]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes_are_kept(self, dtype: torch.dtype, name: str, tmp_path: pathlib.Path) -> None:
        model = MODELS[name].make().to(dtype)
        model.save_pretrained(tmp_path)
        assert_same(MODELS[name].kind.from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_settings_are_plain_and_make_the_model(self, name: str) -> None:
        model = MODELS[name].make()
        assert json.loads(json.dumps(model.config)) == model.config
        again = type(model)(**model.config)
        assert again.config == model.config
        again.load_state_dict(model.state_dict())
        assert_same(MODELS[name].outputs(again.eval()), MODELS[name].outputs(model))
        assert set(model.config) == set(inspect.signature(type(model)).parameters)

    def test_copies_have_settings_of_their_own(self, name: str) -> None:
        model = MODELS[name].make()
        config, copied = copy.deepcopy(model.config), copy.deepcopy(model)
        copied.config.clear()  # is not what the model has
        assert copied.config == model.config == config
        assert pickle.loads(pickle.dumps(model)).config == config

    def test_no_pickle(self, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("pickle")

        model = MODELS[name].make()
        for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler")), (torch, ("load", "save"))):
            for function in names:
                monkeypatch.setattr(module, function, fail)
        model.save_pretrained(tmp_path)
        assert_same(MODELS[name].kind.from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_another_model_in_the_same_folder(self, name: str, tmp_path: pathlib.Path) -> None:
        other = next(kind for kind in MODELS if kind != name)
        MODELS[other].make().save_pretrained(tmp_path)
        MODELS[name].make().save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
        MODELS[name].kind.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"^{other}.from_pretrained: class must be {other}, got class='{name}'$"):
            MODELS[other].kind.from_pretrained(tmp_path)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def tamper(folder: pathlib.Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        changed = change(config)
        (folder / "config.json").write_text(json.dumps(config if changed is None else changed))

    return tamper


def _weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[pathlib.Path], None]:
    def tamper(folder: pathlib.Path) -> None:
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors_torch.save_file(weights, folder / "model.safetensors")

    return tamper


def _first_leaf(settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The first setting that is no section, and the section that it is in."""
    name, value = next(iter(settings.items()))
    return _first_leaf(value) if isinstance(value, dict) else (settings, name)


def _wrong_type(config: dict[str, Any]) -> None:
    section, name = _first_leaf(config["settings"])
    section[name] = {"no": "setting"}


def _unknown_in_a_section(config: dict[str, Any]) -> None:
    _first_leaf(config["settings"])[0]["strange"] = 1


def _first(weights: dict[str, Tensor]) -> str:
    return next(name for name, weight in weights.items() if weight.is_floating_point() and weight.dim())


def _pickled(folder: pathlib.Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model.safetensors")


def _cut(share: float) -> Callable[[pathlib.Path], None]:
    def tamper(folder: pathlib.Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])

    return tamper


def _text(content: bytes) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / "config.json").write_bytes(content)


def _without(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).unlink()


def _remove_first(entries: dict[str, Any]) -> None:
    del entries[next(iter(entries))]


WHOLE = "model.safetensors must be a whole safetensors file, got "
OBJECT = "config.json must be an object with class, vattn, settings, got "
TAMPERED: dict[str, tuple[Callable[[pathlib.Path], Any], type[Exception], str]] = {
    "no config": (_without("config.json"), FileNotFoundError, "folder must hold config.json, got folder="),
    "no weights": (_without("model.safetensors"), FileNotFoundError, "folder must hold model.safetensors, got folder="),
    "no JSON": (_text(b"{'class'"), ValueError, "config.json must be JSON, got "),
    "no text": (_text(b"\xff\xfe\x00"), ValueError, "config.json must be JSON, got "),
    "deep JSON": (_text(b"[" * 10**5), ValueError, "config.json must be JSON, got "),
    "no object": (_config(lambda c: [c]), ValueError, f"{OBJECT}list"),
    "no class": (_config(_remove_first), ValueError, f"{OBJECT}vattn, settings$"),
    "more keys": (_config(lambda c: c.update(more=1)), ValueError, f"{OBJECT}.*more$"),
    "another class": (_config(lambda c: c.update({"class": "Y"})), ValueError, r"class must be \w+, got class='Y'$"),
    "a list of settings": (
        _config(lambda c: c.update(settings=[1])), TypeError, r"settings must be an object, got settings=\[1\]$",
    ),
    "unknown setting": (
        _config(lambda c: c["settings"].update(strange=1)), ValueError, "settings must be among .*, got strange=1$",
    ),
    "unknown setting of a part": (
        _config(_unknown_in_a_section), ValueError, r"settings must be among .*, got (\w+\.)?strange=1$",
    ),
    "wrong type": (_config(_wrong_type), TypeError, r"((\w+\.)?\w+) must be .*, got \1={'no': 'setting'}$"),
    "empty weights": (_cut(0.0), ValueError, WHOLE),
    "half of the weights": (_cut(0.5), ValueError, WHOLE),
    "a cut header": (_cut(0.001), ValueError, WHOLE),
    "pickled weights": (_pickled, ValueError, WHOLE),
    "missing weight": (_weights(_remove_first), ValueError, r"weights must have [\w.]+, got \d+ others$"),
    "unexpected weight": (
        _weights(lambda w: w.update(strange=torch.zeros(2))), ValueError,
        r"weights must be those of the model, got strange.shape=\(2,\)$",
    ),
    "wrong shape": (
        _weights(lambda w: w.update({_first(w): torch.zeros(2, 7)})), ValueError,
        r"([\w.]+) must have shape \(.*\), got \1.shape=\(2, 7\)$",
    ),
    "whole numbers": (
        _weights(lambda w: w.update({_first(w): w[_first(w)].long()})), TypeError,
        r"([\w.]+) must have a dtype such as torch.float32, got \1.dtype=torch.int64$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_folders_are_refused(how: str, name: str, folders: Any) -> None:
    tamper, error, message = TAMPERED[how]
    folder = folders(name)
    tamper(folder)
    kind = MODELS[name].kind
    with pytest.raises(error, match=f"^{kind.__name__}.from_pretrained: {message}"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("folder", ["nowhere", "/no/where", "no/such/folder", pathlib.Path("no/where")])
def test_folders_that_are_not_there(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=f"^LapsViT.from_pretrained: folder must be .*, got folder='{folder}'$"):
        LapsViT.from_pretrained(folder)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"num_heads": 5}, "LeapAttention: dim must be a multiple of num_heads=5, got dim=16"),
        ({"patch_size": 0}, ".*by zero"),
        ({"mlp_ratio": float("inf")}, "cannot convert float infinity to integer"),
        ({"levels": []}, "LapsViT: levels must have at least one element, got .*"),
    ],
)
def test_values_that_do_not_fit_are_explained(setting: dict[str, Any], message: str, folders: Any) -> None:
    folder = folders("LapsViT")
    _config(lambda config: config["settings"].update(setting))(folder)
    with pytest.raises(ValueError, match=f"^LapsViT.from_pretrained: settings must make .*, which says: {message}$"):
        LapsViT.from_pretrained(folder)


class TestOverrides:
    """Settings that win over those that were saved."""

    def test_of_a_model(self, folders: Any) -> None:
        model = LapsViT.from_pretrained(folders("LapsViT"), fold_div=0, levels=(None,))
        assert (model.config["fold_div"], model.config["levels"], model.config["num_frames"]) == (0, [None], 4)

    def test_of_a_part_one_by_one(self, folders: Any) -> None:
        model = SViTT.from_pretrained(folders("SViTT"), video={"sparsity": {"keep": 0.25}}, text={"dropout": 0.2})
        assert (model.video.sparsity.keep, model.video.sparsity.block_size, model.text.drop.p) == (0.25, 3, 0.2)
        assert VideoEncoder.from_pretrained(folders("VideoEncoder"), sparsity=SPARSE).sparsity == SPARSE

    def test_unknown_ones_are_refused(self, folders: Any) -> None:
        with pytest.raises(ValueError, match=r"^LapsViT.from_pretrained: .* unexpected keyword argument 'strange'$"):
            LapsViT.from_pretrained(folders("LapsViT"), strange=1)


class TestRepositories:
    """Names that are no folders."""

    @pytest.mark.parametrize("name, revision", [("some/model", None), ("some/model@v1.0", "v1.0")])
    def test_are_fetched(self, name: str, revision: Any, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")
        calls: list[Any] = []

        def snapshot_download(repository: str, **options: Any) -> str:
            calls.append((repository, options["revision"], options["allow_patterns"]))
            return str(folders("LapsViT"))

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        assert_same(LapsViT.from_pretrained(name).state_dict(), MODELS["LapsViT"].make().state_dict())
        assert calls == [("some/model", revision, ["config.json", "model.safetensors"])]

    def test_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")

        def snapshot_download(*_: Any, **__: Any) -> str:
            raise OSError("offline")

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        with pytest.raises(FileNotFoundError, match=r"^LapsViT.from_pretrained: folder must .* folder='a/b': offline$"):
            LapsViT.from_pretrained("a/b")

    def test_need_huggingface_hub_and_folders_do_not(self, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = folders("LapsViT")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        LapsViT.from_pretrained(folder)
        with pytest.raises(ImportError, match=r"pip install 'vattn\[models\]'$"):
            LapsViT.from_pretrained("some/model")
