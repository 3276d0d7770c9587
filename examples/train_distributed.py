"""One long video over several processes: a MeBT learns codes of real clips, each process having a share of the tokens.

    clips  ->  patches of 4 x 4 x 4 pixels  ->  the nearest of 128 patches  ->  codes (8, size / 4, size / 4)  ->  MeBT

Contexts and targets are spread over the processes (:func:`vattn.distributed.parallelize`), and so are weights and the
optimizer's state (FSDP). The losses are those of one process: every run draws its curve beside those of other runs with
the same options in the same outputs, and the program fails where they differ, or where the loss has not fallen. The
checkpoint is torch's distributed one: another number of processes goes on from it. At the end the processes continue a
held-out clip together, which is shown as a GIF and an MP4.

    torchrun --nproc-per-node 2 -m examples.train_distributed
    python -m examples.train_distributed                                                one process, the same curve
    torchrun --nproc-per-node 2 -m examples.train_distributed --until 100               stops after step 100
    torchrun --nproc-per-node 4 -m examples.train_distributed --resume                  and goes on, with more processes
    torchrun --nproc-per-node 2 -m examples.train_distributed --videos FOLDER           your own, of 128 frames or more
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import vattn
from examples import clips, pictures
from examples.mebt_video import NUM_CODES, NUM_WINDOWS, SHOWN, small_mebt
from examples.options import Needs, parser, start, verdict
from vattn.distributed import parallelize
from vattn.models.mebt import MeBT, continue_video
from vattn.training import warmup_cosine

WINDOW = 32  # frames
PATCH = 4  # frames, and pixels in height and width
BATCH = 4
LEARNING_RATE = 2e-3
SAVE_EVERY = 100  # steps
SAME = 1e-2
"""How far losses of two runs may be from each other: float32 sums in another order, after all steps."""
NEEDS = Needs(minutes=3, memory=1.0, steps=400)
FALLEN = 0.95
"""The last losses are at most this share of the first ones."""


def cut(videos: Tensor) -> Tensor:
    """``(B, 3, T, height, width)`` to patches ``(B, T / 4, height / 4, width / 4, 3 * 4**3)``."""
    for axis in (4, 3, 2):
        videos = videos.unflatten(axis, (-1, PATCH))
    return videos.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def paste(patches: Tensor) -> Tensor:
    """The inverse of :func:`cut`."""
    videos = patches.unflatten(4, (3, PATCH, PATCH, PATCH)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    for axis in (2, 3, 4):
        videos = videos.flatten(axis, axis + 1)
    return videos


def learn_codebook(patches: Tensor, generator: torch.Generator, rounds: int = 4) -> Tensor:
    """Means of patches that are near each other, ``(NUM_CODES, C)``: some rounds of k-means, from random patches."""
    rows = patches.flatten(0, -2)
    codebook = rows[torch.randperm(len(rows), generator=generator)[:NUM_CODES]]
    for _ in range(rounds):
        nearest = vattn.nearest_code(rows, codebook)
        counts = nearest.bincount(minlength=NUM_CODES)[:, None]
        sums = torch.zeros_like(codebook).index_add(0, nearest, rows)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
    return codebook


@dataclasses.dataclass
class Run:
    """A model in training over the ranks of a mesh, and its checkpoint, which any number of ranks can read."""

    model: MeBT
    mesh: DeviceMesh
    steps: int
    seed: int
    folder: pathlib.Path
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        parallelize(self.model, self.mesh)
        for block in self.model.transformer.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)

    def run(self, codes: Tensor, until: int) -> None:
        """Train up to step `until`. What a step draws depends on its number alone."""
        self.model.train()
        first = len(self.losses)
        bar = tqdm(range(first, until), "MeBT", self.steps, initial=first, unit="step", disable=dist.get_rank() > 0)
        for step in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warmup_cosine(step, self.steps)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            batch = codes[torch.randint(len(codes), (BATCH,), generator=generator)]
            loss = self.model.training_loss(batch, generator=generator)  # this rank's part
            self.optimizer.zero_grad()
            (loss * self.mesh.size()).backward()  # FSDP takes the mean over ranks
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            total = loss.detach()
            dist.all_reduce(total)
            self.losses.append(total.item())
            bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == until:
                self.save()

    def save(self) -> None:
        """Write a checkpoint, and then remove those before it."""
        dcp.save(self._state(), checkpoint_id=self.folder / f"step_{len(self.losses):06}")
        if dist.get_rank() == 0:
            for older in checkpoints(self.folder)[:-1]:
                shutil.rmtree(older)

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one."""
        found = checkpoints(self.folder)
        if not found:
            return False
        state = self._state()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.losses = json.loads(state["losses"])
        return True

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "losses": json.dumps(self.losses)}


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those that are complete, in the order of their steps."""
    return sorted(path.parent for path in folder.glob("step_*/.metadata"))


def compare(path: pathlib.Path, name: str, losses: Sequence[float], options: dict[str, Any]) -> float | None:
    """Add a curve to the others of the same options, in a file and a picture; how far it is from any at most."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    curves = stored["curves"] if stored.get("options") == options else {}
    apart = [abs(a - b) for other in curves.values() for a, b in zip(losses, other, strict=False)]
    curves[name] = list(losses)
    path.write_text(json.dumps({"options": options, "curves": curves}))
    title = "masked codes, with the tokens of each clip over processes"
    pictures.loss_curves(curves, path.with_suffix(".png"), title)
    return max(apart, default=None)


def train(options: argparse.Namespace) -> int:
    """Train over all ranks of the default group; whether it failed, on each of them."""
    # A block hands streams on that it does not change. Nothing works on them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        start(__doc__, options, NEEDS)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    loaded = clips.load(
        options.size, options.videos, fps=options.fps, num_frames=clips.frames_to_split(WINDOW), progress=rank == 0
    )
    train_videos, held_out = clips.split([*loaded.values()])
    patches = cut(torch.cat(clips.some_windows(train_videos, WINDOW, every=PATCH, most=NUM_WINDOWS)))
    codebook = learn_codebook(patches, torch.Generator().manual_seed(options.seed))
    codes = vattn.nearest_code(patches, codebook)

    torch.manual_seed(options.seed)
    model = small_mebt(NUM_CODES, (codes.shape[1], codes.shape[2], codes.shape[3]))
    run = Run(model, mesh, options.steps, options.seed, options.outputs / "distributed_checkpoint")
    resumed = options.resume and run.resume()
    if not resumed and rank == 0:
        shutil.rmtree(run.folder, ignore_errors=True)
    dist.barrier()
    begin = len(run.losses)
    until = options.steps if options.until is None else min(options.until, options.steps)
    run.run(codes, until)

    processes = f"{size} process{'es' * (size > 1)}"
    name = f"{processes}, resumed at {begin}" if resumed else processes
    path = options.outputs / "distributed_loss.json"
    failed = 0
    if rank == 0:
        same = {"steps": options.steps, "size": options.size, "seed": options.seed, "videos": str(options.videos)}
        apart = compare(path, name, run.losses, same)
        share = codes.shape[1:].numel() / size
        print(f"\n{name}: {codes.shape[1:].numel()} tokens a clip, {share:.0f} on each process; wrote {path}")
        others = "no other run to compare with" if apart is None else f"apart from other runs by {apart:.1e} at most"
        print(f"loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}; {others}")
        few = max(1, until // 10)
        if apart is not None and not apart <= SAME:
            failed = 1
            print(f"FAILED: losses must be within {SAME} of those of other runs", file=sys.stderr)
        elif until == options.steps and not sum(run.losses[-few:]) <= FALLEN * sum(run.losses[:few]):
            failed = verdict(["the loss has not fallen"], options, 0)
    if until == options.steps:
        write_continuation(run.model, codebook, held_out, options)
    result = torch.tensor(failed)
    dist.broadcast(result, 0)
    return int(result)


def write_continuation(model: MeBT, codebook: Tensor, held_out: Sequence[Tensor], options: argparse.Namespace) -> None:
    """The second half of held-out windows, found from the first half by all processes together."""
    model.eval()
    truth = torch.cat(
        [clips.windows(video, WINDOW, every=WINDOW)[:1] for video in held_out if len(video) >= WINDOW][:SHOWN]
    )
    codes = vattn.nearest_code(cut(truth), codebook)
    known = codes.shape[1] // 2
    generator = torch.Generator().manual_seed(options.seed)
    found = continue_video(
        model, codes[:, :known], codes.shape[1], num_steps=8, temperature=0.9, generator=generator,
        progress=dist.get_rank() == 0,
    )  # fmt: skip
    if dist.get_rank() == 0:
        columns = {"truth": truth, "its codes": paste(codebook[codes]), "continuation": paste(codebook[found])}
        pictures.side_by_side(columns, options.outputs / "distributed_continuation.gif")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--until", type=int, help="the step after which to stop; the last one by default")
    of_all.add_argument("--size", type=int, default=32, help="of a frame in pixels, a multiple of 4")
    of_all.add_argument("--short", action="store_true", help="few steps, of small frames")
    of_all.add_argument("--resume", action="store_true", help="go on from the checkpoint in the outputs")
    options = of_all.parse_args(arguments)
    if options.short:
        options.steps, options.size = min(options.steps, 40), min(options.size, 16)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return train(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
