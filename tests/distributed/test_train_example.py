"""The example of training over processes: its curve is that of one, also from a checkpoint of another number."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from PIL import Image

from examples import clips, train_distributed
from tests.distributed.processes import World, results, run_cases

SHORT = ["--steps", "4", "--size", "16", "--outputs"]


def run(outputs: Path, *arguments: str) -> None:
    with mock.patch.object(clips, "NAMES", ("bikes",)), mock.patch.object(train_distributed, "FALLEN", 2.0):
        assert train_distributed.train(train_distributed.parse([*SHORT, str(outputs), *arguments])) == 0


def of_two(world: World, folder: Path) -> None:
    run(folder / "from two", "--until", "2")
    run(folder / "from one", "--resume")


class OfTwo:
    """A case that knows its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world: World) -> None:
        of_two(world, self.folder)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(folder / "alone")
        run(folder / "from one", "--until", "2")
        found = run_cases({"of two": OfTwo(folder)}, tmp_path_factory.mktemp("processes"), (2,))
        assert list(results(found, "of two", 2)) == [None, None]
        shutil.copytree(folder / "from two", folder / "two to one")
        run(folder / "two to one", "--resume")
    finally:
        dist.destroy_process_group()
    return folder


def curves(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distributed_loss.json").read_text())["curves"]


@pytest.mark.slow
def test_curves_are_those_of_one_process(outputs: Path) -> None:
    alone = curves(outputs / "alone")["1 process"]
    assert len(alone) == 4
    for folder, name, other, steps in (
        ("from two", "2 processes", None, 2),
        ("two to one", "1 process, resumed at 2", "2 processes", 4),
        ("from one", "2 processes, resumed at 2", "1 process", 4),
    ):
        found = curves(outputs / folder)
        assert list(found) == [name] if other is None else [other, name]
        assert found[name] == pytest.approx(alone[:steps], abs=1e-4)


@pytest.mark.slow
def test_ones_own_videos(videos: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(tmp_path, "--videos", str(videos), "--steps", "2")
    finally:
        dist.destroy_process_group()
    assert len(curves(tmp_path)["1 process"]) == 2
    assert all((tmp_path / f"distributed_continuation.{suffix}").exists() for suffix in ("gif", "mp4"))


@pytest.mark.slow
def test_the_last_checkpoint_and_pictures_stay(outputs: Path) -> None:
    for folder, step in (("alone", 4), ("from two", 2), ("two to one", 4), ("from one", 4)):
        found = train_distributed.checkpoints(outputs / folder / "distributed_checkpoint")
        assert [path.name for path in found] == [f"step_{step:06}"]
        assert (outputs / folder / "distributed_loss.png").exists()
        continuation = outputs / folder / "distributed_continuation.gif"
        assert continuation.exists() == (step == 4)
        if step == 4:
            with Image.open(continuation) as gif:
                assert gif.is_animated  # type: ignore[attr-defined]


def test_curves_that_differ_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    assert train_distributed.compare(path, "one", [3.0, 2.0], {"steps": 2}) is None
    assert train_distributed.compare(path, "two", [3.0, 2.5, 1.0], {"steps": 2}) == 0.5
    assert train_distributed.compare(path, "other", [7.0], {"steps": 3}) is None
