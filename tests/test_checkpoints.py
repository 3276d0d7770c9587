"""Every model is saved and loaded in one form: in another process, bitwise, without pickle; and no other file loads."""

import argparse
import copy
import inspect
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
        assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
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
        ({"mlp_ratio": 1e300}, "cannot .*|.*[oO]verflow.*|.*out of range.*"),
        ({"levels": []}, "LapsViT: levels must have at least one element, got .*"),
    ],
)
def test_values_that_do_not_fit_are_explained(setting: dict[str, Any], message: str, folders: Any) -> None:
    folder = folders("LapsViT")
    _config(lambda config: config["settings"].update(setting))(folder)
    with pytest.raises(ValueError, match=f"^LapsViT.from_pretrained: settings must make .*, which says: {message}$"):
        LapsViT.from_pretrained(folder)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All that is in settings, with the keys and the numbers that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key), item
        yield from _paths(item, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


class TestEverySetting:
    """What a file says of each setting, of parts, too, and in lists."""

    def test_must_be_there(self, name: str, folders: Any) -> None:
        """A constructor has defaults; a file has what the model was, or is none, or older than the setting."""
        folder = folders(name)
        config = json.loads((folder / "config.json").read_text())
        whole = MODELS[name].kind.from_pretrained(folder).config
        for path, _ in _paths(config["settings"]):
            if isinstance(path[-1], str):
                changed = copy.deepcopy(config)
                del _at(changed["settings"], path[:-1])[path[-1]]
                (folder / "config.json").write_text(json.dumps(changed))
                if path[-1] == "eval_seed":
                    assert MODELS[name].kind.from_pretrained(folder).config == whole
                    continue
                message = f"^{name}.from_pretrained: settings must have {'.'.join(path)}, got "
                with pytest.raises(ValueError, match=message):
                    MODELS[name].kind.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["video", "text"])
    def test_parts_must_be_there(self, part: str, folders: Any) -> None:
        folder = folders("SViTT")
        _config(lambda config: config["settings"].update({part: None}))(folder)
        with pytest.raises(TypeError, match=rf"^SViTT.from_pretrained: {part} must be an object, got {part}=None$"):
            SViTT.from_pretrained(folder)

    @pytest.mark.parametrize("huge", [10**7, 10**30])
    def test_nothing_is_built_from_huge_numbers(self, huge: int, name: str, folders: Any) -> None:
        """Neither an endless model nor one that fills the memory."""
        folder = folders(name)
        config = json.loads((folder / "config.json").read_text())
        for path, value in _paths(config["settings"]):
            if isinstance(value, int) and not isinstance(value, bool):
                changed = copy.deepcopy(config)
                _at(changed["settings"], path[:-1])[path[-1]] = huge
                (folder / "config.json").write_text(json.dumps(changed))
                setting = [part for part in path if isinstance(part, str)][-1]
                with pytest.raises(ValueError, match=rf"^{name}.from_pretrained: .*{setting} must be at most "):
                    MODELS[name].kind.from_pretrained(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_is_no_number_that_json_has_not(self, value: float, name: str, folders: Any) -> None:
        folder = folders(name)
        setting, _ = next(iter(json.loads((folder / "config.json").read_text())["settings"].items()))
        _config(lambda config: config["settings"].update({setting: value}))(folder)
        with pytest.raises(ValueError, match=f"^{name}.from_pretrained: config.json must be JSON, got .* no number"):
            MODELS[name].kind.from_pretrained(folder)

    def test_is_finite(self, folders: Any) -> None:
        folder = folders("LapsViT")
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"mlp_ratio": 2.0', '"mlp_ratio": 1e999'))
        with pytest.raises(ValueError, match=r"^LapsViT.from_pretrained: mlp_ratio must be finite, got mlp_ratio=inf$"):
            LapsViT.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"^LapsViT.from_pretrained: mlp_ratio must be finite, got mlp_ratio=nan$"):
            LapsViT.from_pretrained(folders("LapsViT"), mlp_ratio=float("nan"))


def _changed(value: Any) -> Any:
    """Another value of the kind, None if there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}er"
    return type(value)([*value, 7]) if isinstance(value, (tuple, list, frozenset)) else None


def test_all_that_a_layer_knows_is_noticed(name: str) -> None:
    """A number, a flag or a name that is changed after construction is not lost in silence by `save_pretrained`."""
    model, silent = MODELS[name].make(), set()
    for layer in model.modules():
        for attribute, value in list(vars(layer).items()):
            other = _changed(value)
            is_setting = not attribute.startswith("_") and attribute != "training" and other is not None
            if type(layer).__module__.startswith("vattn.") and is_setting:
                before = layer.extra_repr()
                setattr(layer, attribute, other)
                if layer.extra_repr() == before:
                    silent.add(f"{type(layer).__name__}.{attribute}")
                setattr(layer, attribute, value)
    assert not silent


class TestOfficialInputs:
    """What `from_official` is given, and is not what it wants."""

    @pytest.fixture(params=[name for name, entry in MODELS.items() if entry.official is not None])
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def load(self, name: str, **given: Any) -> Any:
        entry = MODELS[name]
        assert entry.official is not None
        official = entry.official(entry.make())._asdict() | given
        return entry.kind.from_official(official["state_dict"], official["config"], **official["overrides"])

    @pytest.mark.parametrize("state_dict", [None, 3, nn.Linear(1, 1), [torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}])
    def test_no_weights(self, state_dict: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"^{name}.from_official: state_dict must "):
            self.load(name, state_dict=state_dict)

    @pytest.mark.parametrize("config", [3, [1], "config.yaml", {1, 2}])
    def test_no_configuration(self, config: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"^{name}.from_official: config must be a mapping, got config="):
            self.load(name, config=config)

    def test_a_parsed_command_line(self, name: str) -> None:
        def parsed(config: Any) -> Any:
            if not isinstance(config, Mapping):
                return config
            return argparse.Namespace(**{key: parsed(value) for key, value in config.items()})

        entry = MODELS[name]
        assert entry.official is not None
        found = self.load(name, config=parsed(entry.official(entry.make()).config))
        assert found.config == self.load(name).config

    def test_missing_weights(self, name: str) -> None:
        """One of each name, whatever the numbers of layers in it."""
        entry = MODELS[name]
        assert entry.official is not None
        weights = dict(entry.official(entry.make()).state_dict)
        for missing in {re.sub(r"\d+", "#", key): key for key in weights}.values():
            rest = {key: weight for key, weight in weights.items() if key != missing}
            try:
                self.load(name, state_dict=rest)
            except (RuntimeError, ValueError) as error:
                assert str(error).startswith(
                    (f"{name}.from_official: ", f"{name}: ", "Error(s) in loading state_dict")
                ), error

    def test_settings_of_other_types(self, name: str) -> None:
        """Those of a configuration and those that override it are asked for what those of a file are."""
        entry = MODELS[name]
        assert entry.official is not None
        config: Any = entry.official(entry.make()).config
        for path, value in _paths(config):
            if not isinstance(path[-1], int) and not isinstance(value, (Mapping, argparse.Namespace)):
                changed = copy.deepcopy(config)
                _at(changed, path[:-1])[path[-1]] = [[["no"]]]
                if path[-1] == "n_cond_frames":  # is not read
                    continue
                with pytest.raises(TypeError, match=rf"^{name}.from_official: {path[-1]} must be .*, got {path[-1]}="):
                    self.load(name, config=changed)
        for setting in entry.make().config:
            with pytest.raises(TypeError, match=rf"^{name}.from_official: {setting}.* must be .*, got {setting}"):
                self.load(name, overrides={setting: [[["no"]]]})
        with pytest.raises(ValueError, match=rf"^{name}.from_official: settings must be among .*, got strange=1$"):
            self.load(name, overrides={"strange": 1})


def test_models_that_are_loaded_in_inference_can_be_trained(name: str, folders: Any) -> None:
    entry = MODELS[name]
    with torch.inference_mode():
        loaded = [entry.kind.from_pretrained(folders(name))]
        if entry.official is not None:
            official = entry.official(entry.make())
            loaded.append(entry.kind.from_official(official.state_dict, official.config, **official.overrides))
    for model in loaded:
        assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("folder", [None, 3, b"folder", ["folder"]])
def test_what_is_no_folder(folder: Any) -> None:
    for method in (LapsViT.from_pretrained, MODELS["LapsViT"].make().save_pretrained):
        with pytest.raises(TypeError, match=rf"^LapsViT.{method.__name__}: folder must be a string or a path, got fol"):
            method(folder)
        with pytest.raises(ValueError, match=rf"^LapsViT.{method.__name__}: folder must not be empty, got folder=''"):
            method("")


@pytest.mark.parametrize("inside", ["", "inside"])
def test_a_file_is_no_folder(inside: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"^LapsViT.save_pretrained: folder must not be a file, or in one, got "):
        MODELS["LapsViT"].make().save_pretrained(tmp_path / "file" / inside)


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
        with pytest.raises(ValueError, match=r"^LapsViT.from_pretrained: settings must be among .*, got strange=1$"):
            LapsViT.from_pretrained(folders("LapsViT"), strange=1)

    def test_are_of_the_types_of_settings(self, name: str, folders: Any) -> None:
        """The very message of a file with such a setting."""
        kind, folder = MODELS[name].kind, folders(name)
        for setting in json.loads((folder / "config.json").read_text())["settings"]:
            with pytest.raises(TypeError, match=rf"^{name}.from_pretrained: {setting}.* must be .*, got {setting}"):
                kind.from_pretrained(folder, **{setting: [[["no"]]]})


def _programs(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


class TestCards:
    """The README.md of a folder: what the Hub reads of it, and what a person runs."""

    def test_of_every_model(self, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")
        model = MODELS[name].make()
        model.save_pretrained(tmp_path / "my model", license="apache-2.0", base_model="some/model")
        text = (tmp_path / "my model" / "README.md").read_text()
        data = hub.ModelCard(text).data.to_dict()
        package = MODELS[name].kind.__module__.split(".")[2]
        assert data == {
            "library_name": "vattn", "license": "apache-2.0", "base_model": "some/model",
            "tags": ["vattn", "video", package],
        }  # fmt: skip
        (program,) = _programs(text)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(program, names)
        assert_same(names["model"].state_dict(), model.state_dict())
        results = {"logits", "vector", "states", "similarity", "ranking", "codes", "features", "latents"}
        assert results & set(names)  # it is used, and not just loaded
        settings = {key: json.loads(value) for key, value in re.findall(r"^- `(\w+)`: `(.*)`$", text, re.MULTILINE)}
        assert settings == model.config

    def test_nothing_is_made_up(self, tmp_path: pathlib.Path) -> None:
        MODELS["LapsViT"].make().save_pretrained(tmp_path)
        front = (tmp_path / "README.md").read_text().split("---")[1]
        assert front == "\nlibrary_name: vattn\ntags:\n- vattn\n- video\n- laps\n"

    def test_of_another_dtype(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        MODELS["LapsViT"].make().bfloat16().save_pretrained(tmp_path / "low")
        (program,) = _programs((tmp_path / "low" / "README.md").read_text())
        assert ".float()  # saved as bfloat16" in program
        monkeypatch.chdir(tmp_path)
        exec(program, {})

    def test_a_card_that_is_there_stays(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        MODELS["LapsViT"].make().save_pretrained(tmp_path, license="mit")
        assert (tmp_path / "README.md").read_text() == "mine"
        assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]

    @pytest.mark.parametrize("argument", ["repository", "license", "base_model"])
    def test_what_they_say_is_text(self, argument: str, tmp_path: pathlib.Path) -> None:
        given: Any = {argument: 3}
        message = rf"^LapsViT.save_pretrained: {argument} must be a string or None, got {argument}=3$"
        with pytest.raises(TypeError, match=message):
            MODELS["LapsViT"].make().save_pretrained(tmp_path, **given)
        assert os.listdir(tmp_path) == []


OFFLINE = """
import pathlib, re, sys
import torch
from tests.model_zoo import MODELS, assert_same

def run(card):
    for program in re.findall(r"```python\\n(.*?)```", card.read_text(), re.DOTALL):
        exec(program, {})

for name, entry in MODELS.items():
    model = entry.kind.from_pretrained(f"somebody/{name}")
    made = entry.make()
    assert model.config == made.config
    assert_same(model.state_dict(), made.state_dict())
    assert_same(entry.outputs(model), entry.outputs(made))
    run(pathlib.Path(sys.argv[1], f"models--somebody--{name}", "snapshots", "0" * 40, "README.md"))
    model.save_pretrained(pathlib.Path(sys.argv[2], name))
    assert f'base_model: "somebody/{name}"' in pathlib.Path(sys.argv[2], name, "README.md").read_text()
revised = MODELS["LapsViT"].kind.from_pretrained("somebody/LapsViT@v1")
assert_same(revised.state_dict(), MODELS["LapsViT"].make().state_dict())
for missing in ("somebody/nothing", "somebody/LapsViT@v2"):
    try:
        MODELS["LapsViT"].kind.from_pretrained(missing)
    except FileNotFoundError as error:
        assert str(error).startswith(
            "LapsViT.from_pretrained: folder must be a folder, or a repository that can be read, "
            f"got folder='{missing}': "
        ), error
    else:
        raise AssertionError(missing)
"""


@pytest.mark.slow
def test_names_in_a_local_hub(tmp_path: pathlib.Path) -> None:
    """Models, and the programs of their cards, from the folders that the Hub's client keeps, without a network."""
    pytest.importorskip("huggingface_hub")
    for name, entry in MODELS.items():
        repository = tmp_path / "hub" / f"models--somebody--{name}"
        (repository / "refs").mkdir(parents=True)
        for revision in ("main", "v1"):
            (repository / "refs" / revision).write_text("0" * 40)
        entry.make().save_pretrained(repository / "snapshots" / ("0" * 40), repository=f"somebody/{name}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = [tmp_path / "hub", tmp_path / "saved"]
    subprocess.run([sys.executable, "-c", OFFLINE, *arguments], cwd=ROOT, env=environment, check=True)


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
        with pytest.raises(ImportError, match=r"install vattn with the extra 'models'$"):
            LapsViT.from_pretrained("some/model")
