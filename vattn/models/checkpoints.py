"""Models on disk: official checkpoints are read, and every model is saved and loaded in one form, without pickle.

    model.save_pretrained(folder)                      Model.from_pretrained(folder, **overrides)

    folder/config.json          {"class": "LapsViT", "vattn": "0.1.0", "settings": {"num_frames": 8, ...}}
    folder/model.safetensors    every weight and buffer under its name, in its dtype
    folder/README.md            the model card (:mod:`vattn.models.cards`)

A model is its settings (:mod:`vattn.models.settings`) and its weights. Settings are recorded when it is made. Weights
are never drawn only to be overwritten: a model is built without storage first, and then given its weights.
"""

import copy
import inspect
import json
import os
import pathlib
import re
import tempfile
import types
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn._extras import needs
from vattn._version import __version__
from vattn.models.cards import CARD, card
from vattn.models.settings import override, plain, require_numbers, require_path, require_settings, tuples

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEYS = ("class", "vattn", "settings")

LARGEST = 2**16
"""No whole number in settings is larger, unless the weights have so many elements: it would be a size of something."""

Model = TypeVar("Model", bound=nn.Module)


class PretrainedModel(nn.Module):
    """A model that is saved as a folder, and loaded from one, or from a repository of the Hugging Face Hub.

    What a subclass takes in its constructor are its settings. They must be plain values: numbers, strings, bools, None,
    and lists, tuples and dicts of them; dataclasses of them are written as dicts. :attr:`config` has them all.

    A setting with the name of a part that is a :class:`PretrainedModel` is a dict of that part's settings. Its class is
    what the subclass annotates, such as ``video: VideoEncoder``.

    A buffer that is not persistent is not saved, and must be made on a device that the constructor names, since there
    is no storage where a model is built to be loaded.

    Example:
        >>> class Classifier(PretrainedModel):
        ...     def __init__(self, channels: int, classes: tuple[str, ...] = ("walk", "run")) -> None:
        ...         super().__init__()
        ...         self.head = nn.Linear(channels, len(classes))
        >>> model = Classifier(4)
        >>> model.config
        {'channels': 4, 'classes': ['walk', 'run']}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     print(sorted(os.listdir(folder)))
        ...     loaded = Classifier.from_pretrained(folder)
        ['README.md', 'config.json', 'model.safetensors']
        >>> torch.equal(loaded.head.weight, model.head.weight), loaded.training
        (True, False)
    """

    _settings: dict[str, Any]
    _base_model: str | None = None  # the repository that it was loaded from
    added_settings: frozenset[str] = frozenset()
    """Settings that folders of older versions do not have: their defaults are what there was before."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        model = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(model, *args, **settings)
        except TypeError:  # the constructor says what is wrong; a copy is made without arguments, and gets its settings
            return model
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        for parameter in bound.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name)
        model.__dict__["_settings"] = {name: plain(f"{cls.__name__}: {name}", value) for name, value in given.items()}
        return model

    @property
    def config(self) -> dict[str, Any]:
        """The settings that make this model, as JSON has them: ``type(model)(**model.config)`` is another one."""
        parts = {name: part.config for name, part in self.named_children() if isinstance(part, PretrainedModel)}
        return copy.deepcopy(self._settings) | {name: parts[name] for name in parts if name in self._settings}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        repository: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write the model to `folder`, which is made if it does not exist; what it held of a model is replaced.

        A model card is written, too, unless there is a ``README.md``, which may be somebody's own: delete it for a new
        one. The folder is what the Hub has of a model: ``huggingface_hub.upload_folder`` puts it there.

        Weights are written in their own dtypes. What a checkpoint of training has besides, such as the state of an
        optimizer, is not there, nor whether a weight is trained, nor its memory format. A folder whose writing was
        interrupted has no ``config.json``, and does not load.

        Args:
            folder: where to.
            repository: ``"owner/name"``, by which the card loads the model; None for the name of the folder.
            license: of the weights, such as ``"apache-2.0"``; None for a card without one.
            base_model: the repository of the model that this one was trained from; None for the one that it was loaded
                from, if it was one.

        Raises:
            ValueError: the model is not what its settings make, such as one with a layer replaced, or has no storage.
            FileExistsError: `folder` is a file, or in one.
            TypeError: `folder` is neither a string nor a path, or what the card says is no string.
            ImportError: safetensors is not installed.
        """
        op = f"{type(self).__name__}.save_pretrained"
        for name, given in (("repository", repository), ("license", license), ("base_model", base_model)):
            if not isinstance(given, str | None):
                raise TypeError(f"{op}: {name} must be a string or None, got {name}={given!r}")
        save_file = _safetensors(op).torch.save_file
        where = require_path(op, "folder", folder)
        settings = self.config
        require_numbers(op, settings, _largest(self.state_dict()))
        _require_same_parts(op, self, _build_empty(lambda: _make(type(self), settings)))
        written, state = {}, self.state_dict()
        for names in _tied(self):
            weight = state[names[0]]
            if weight.is_meta:
                raise ValueError(f"{op}: weights must have storage, got {names[0]}.device=meta")
            written[names[0]] = weight.detach().cpu().contiguous()
        storages = [weight.untyped_storage().data_ptr() for weight in written.values() if weight.numel()]
        if len(set(storages)) < len(storages):  # safetensors writes no views of one storage
            written = {name: weight.clone() for name, weight in written.items()}
        config = {"class": type(self).__name__, "vattn": __version__, "settings": settings}
        known = {"license": license, "base_model": base_model or self._base_model}
        facts = {key: value for key, value in known.items() if value}
        # A subclass of somebody else has settings and inputs of its own.
        imports, usage = (self._usage_imports, self._usage()) if _is_ours(type(self)) else ((), "")
        text = card(self, repository or where.resolve().name, imports, usage, settings, facts)
        try:
            where.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise FileExistsError(f"{op}: folder must not be a file, or in one, got folder={str(where)!r}") from error
        with tempfile.TemporaryDirectory(dir=where, prefix=".saving-") as part:
            new = pathlib.Path(part)
            save_file(written, new / WEIGHTS, metadata={"format": "pt"})
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / CARD).write_text(text, encoding="utf-8")
            if not (where / CARD).exists():
                os.replace(new / CARD, where / CARD)
            (where / CONFIG).unlink(missing_ok=True)  # old settings never meet new weights
            os.replace(new / WEIGHTS, where / WEIGHTS)
            os.replace(new / CONFIG, where / CONFIG)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> Self:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode, on the CPU, with the dtypes it had.

        Args:
            folder: where it is, or ``"owner/name"`` of a repository of the Hugging Face Hub, also with a revision:
                ``"owner/name@revision"``.
            overrides: settings that win over those that were saved, such as those of dropout. One that is a dict wins
                entry by entry.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            TypeError, ValueError: the files are not those of such a model.
            ImportError: safetensors, or huggingface_hub for a repository, is not installed.
        """
        op = f"{cls.__name__}.from_pretrained"
        safetensors = _safetensors(op)
        where = _find(op, folder)
        settings = override(_read_config(op, cls, where / CONFIG), _plain_overrides(op, overrides))
        require_settings(op, cls, settings, PretrainedModel)
        with torch.inference_mode(False):  # weights can be trained, wherever they are loaded
            try:
                with safetensors.safe_open(where / WEIGHTS, framework="pt") as file:
                    # Copies: in memory of their own, whatever becomes of the file.
                    weights = cls._renewed({name: file.get_tensor(name).clone() for name in file.keys()})
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{op}: {WEIGHTS} must be a whole safetensors file, got {where / WEIGHTS}") from error
            require_numbers(op, settings, _largest(weights))
            try:
                empty = _build_empty(lambda: _make(cls, settings))
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{op}: settings must make a {cls.__name__}, got settings={settings}, which says: {error}"
                ) from error
            _require_same_weights(op, empty, weights)
            model = _fill(empty, weights)
        model._base_model = None if pathlib.Path(folder).is_dir() else str(folder).partition("@")[0]
        return model

    _usage_imports: tuple[str, ...] = ()
    """What :meth:`_usage` uses of the package that the class is in."""

    def _usage(self) -> str:
        """Lines of Python that show how to use a `model` like this one, for its card; they may use `torch`."""
        return ""

    @classmethod
    def _renewed(cls, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of a folder that an older version may have written, as this version has them."""
        return weights

    @classmethod
    def _from_weights(
        cls, weights: Mapping[str, Tensor], settings: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> Self:
        """The model of weights under their names here, in evaluation mode; `overrides` win over `settings`."""
        return load(weights, lambda: cls(**override(settings, overrides or {})))

    @classmethod
    def _require_overrides(cls, op: str, overrides: Mapping[str, Any]) -> None:
        """Overrides are some of the settings, and of their types."""
        require_settings(op, cls, _plain_overrides(op, overrides), PretrainedModel, complete=False)

    def _reconfigure(self, **settings: Any) -> None:
        """Record that settings, of those that there are, are others than those the model was made with."""
        op, names = type(self).__name__, [name for name in settings if name in self._settings]
        self._settings = self._settings | {name: plain(f"{op}: {name}", settings[name]) for name in names}


def load(weights: Mapping[str, Tensor], build: Callable[[], Model]) -> Model:
    """The model that `build` makes, in evaluation mode, with copies of `weights` that keep dtype and device.

    Raises:
        RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
    """
    with torch.inference_mode(False):  # weights can be trained, wherever they are loaded
        return _fill(_build_empty(build), {name: weight.detach().clone() for name, weight in weights.items()})


def official_weights(op: str, state_dict: Mapping[str, Any], *needed: str) -> dict[str, Tensor]:
    """The weights of a checkpoint under their own names: without an outer dict, and without prefixes.

    A training script saves ``{"epoch": ..., "state_dict": {"module.base_model.head.weight": ...}}``. `needed`
    are names that the weights must have; the first one tells what the prefix is.

    Raises:
        TypeError: `state_dict` is no mapping of names to tensors.
        ValueError: it lacks a name.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{op}: state_dict must be a mapping, got state_dict={type(state_dict).__name__}")
    for outer in ("state_dict", "model"):
        if isinstance(state_dict.get(outer), Mapping):
            state_dict = state_dict[outer]
    for name, weight in state_dict.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise TypeError(
                f"{op}: state_dict must have tensors under names, got {type(weight).__name__} under {name!r}"
            )
    ends = [name.removesuffix(needed[0]) for name in state_dict if name.endswith(needed[0])]
    prefix = next((end for end in ends if end == "" or end.endswith(".")), "")
    weights = {name.removeprefix(prefix): weight for name, weight in state_dict.items()}
    require_names(op, weights, *needed)
    return weights


def require_names(op: str, weights: Mapping[str, Tensor], *needed: str) -> None:
    """`weights` have these names.

    Raises:
        ValueError: they have not.
    """
    for name in needed:
        if name not in weights:
            raise ValueError(
                f"{op}: state_dict must have {name}, got {len(weights)} names: {', '.join(sorted(weights)[:8])}"
            )


def count_blocks(weights: Mapping[str, Tensor], stage: str) -> int:
    """How many ``<stage>.<i>.`` there are."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stage}.")})


def heads_or_default(op: str, num_heads: int | None, embed_dim: int) -> int:
    """`num_heads`, which weights do not show, or heads of 64 channels."""
    if num_heads is None and embed_dim % 64:
        raise ValueError(f"{op}: num_heads must be given unless embed_dim is a multiple of 64, got {embed_dim=}")
    if num_heads is None:
        return embed_dim // 64
    _checks.integer(op, "num_heads", num_heads, least=1)
    return num_heads


def _largest(weights: Mapping[str, Tensor]) -> int:
    """The largest whole number in the settings of a model that has such weights."""
    return max(LARGEST, sum(weight.numel() for weight in weights.values()))


def _build_empty(build: Callable[[], Model]) -> Model:
    """What `build` makes, its weights without storage."""
    with torch.device("meta"):
        return build()


def _make(cls: Callable[..., Model], settings: Mapping[str, Any]) -> Model:
    """The model of settings out of a file, whose lists are the tuples that a constructor is used to."""
    return cls(**{name: tuples(value) for name, value in settings.items()})


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each weight: more than one where layers share it."""
    names: dict[int, list[str]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        names.setdefault(id(weight), []).append(name)
    return list(names.values())


def _fill(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """`model`, which has no storage, with `weights` as they are, in evaluation mode."""
    filled, empty = dict(weights), model.state_dict(keep_vars=True)
    for names in _tied(model):
        given = [name for name in names if name in weights]
        if len(names) > 1 and given:  # one weight for all of them, which must be a parameter to stay one
            weight, old = weights[given[0]], empty[names[0]]
            if not all(torch.equal(weight, weights[name]) for name in given):
                raise ValueError(f"{type(model).__name__}: {' and '.join(given)} must be equal, got others")
            weight = nn.Parameter(weight, old.requires_grad) if isinstance(old, nn.Parameter) else weight
            filled |= dict.fromkeys(names, weight)
    model.load_state_dict(filled, assign=True)
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                raise RuntimeError(f"{type(module).__name__}: {name} is not saved, and must be made on a named device")
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _plain_overrides(op: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as JSON has them."""
    return {name: plain(f"{op}: {name}", value) for name, value in overrides.items()}


def _find(op: str, folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder with the files of a model, which is fetched if it is a repository."""
    where = require_path(op, "folder", folder)
    name = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", folder) if isinstance(folder, str) else None
    if not where.is_dir() and name is not None:
        with needs(op, "models"):
            import huggingface_hub  # not needed otherwise
        try:
            where = pathlib.Path(
                huggingface_hub.snapshot_download(name[1], revision=name[2], allow_patterns=[CONFIG, WEIGHTS])
            )
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise FileNotFoundError(
                f"{op}: folder must be a folder, or a repository that can be read, got folder={folder!r}: {error}"
            ) from error
    if not where.is_dir():
        raise FileNotFoundError(
            f"{op}: folder must be a folder, or the name of a repository, owner/name, got folder={str(folder)!r}"
        )
    for file in (CONFIG, WEIGHTS):
        if not (where / file).is_file():
            raise FileNotFoundError(f"{op}: folder must hold {file}, got folder={str(folder)!r}")
    return where


def _read_config(op: str, cls: type[PretrainedModel], path: pathlib.Path) -> dict[str, Any]:
    """The settings in a file, which must be one of `cls`."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {CONFIG} must be JSON, got {path}: {error}") from error
    if not isinstance(config, dict) or set(config) != set(KEYS):
        found = ", ".join(config) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{op}: {CONFIG} must be an object with {', '.join(KEYS)}, got {found}")
    if config["class"] != cls.__name__:
        raise ValueError(f"{op}: class must be {cls.__name__}, got class={config['class']!r}")
    if not isinstance(config["settings"], dict):
        raise TypeError(f"{op}: settings must be an object, got settings={config['settings']!r}")
    return config["settings"]


def _require_same_parts(op: str, model: nn.Module, made: nn.Module) -> None:
    """`model` has the layers and the weights of `made`, which its settings make."""
    found, wanted = _parts(model), _parts(made)
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{op}: {name} must be what config makes, {wanted.get(name, 'nothing')}, "
                f"got {name}={found.get(name, 'nothing')}"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """What every layer and every weight of a model is, under its name."""
    layers = {}
    for name, layer in model.named_modules():
        is_container = isinstance(layer, (nn.ParameterDict, nn.ParameterList))  # shows its weights, with their device
        layers[name or "model"] = f"{type(layer).__name__}({'' if is_container else layer.extra_repr()})"
    weights = model.state_dict()
    shared = {name: f"{tuple(weights[name].shape)} of {names[0]}" for names in _tied(model) for name in names}
    return layers | shared


def _require_same_weights(op: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`weights` are all those of `model`, of its shapes, and numbers of its kind."""
    empty = model.state_dict(keep_vars=True)
    for names in _tied(model):
        if not any(name in weights for name in names):
            raise ValueError(f"{op}: weights must have {names[0]}, got {len(weights)} others")
    for name, weight in weights.items():
        if name not in empty:
            raise ValueError(f"{op}: weights must be those of the model, got {name}.shape={tuple(weight.shape)}")
        shape, dtype = empty[name].shape, empty[name].dtype
        if weight.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {name}.shape={tuple(weight.shape)}")
        if weight.is_floating_point() != dtype.is_floating_point or not (
            dtype.is_floating_point or weight.dtype == dtype
        ):
            raise TypeError(f"{op}: {name} must have a dtype such as {dtype}, got {name}.dtype={weight.dtype}")


def _safetensors(op: str) -> types.ModuleType:
    with needs(op, "models"):
        import safetensors.torch  # not needed otherwise
    return safetensors


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("vattn.models.")
