"""What the examples have in common on the command line, and what they need."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

MACHINE = "one core of an Intel Xeon with AVX-512 and AMX"


class Needs(NamedTuple):
    """Of an example with the clips that come along, on `MACHINE`: measured, or estimated from fewer steps.

    Attributes:
        minutes: of processor time. memory: the most that it held, in GiB. steps: of training in these minutes.
    """

    minutes: float
    memory: float
    steps: int

    def text(self, steps: int) -> str:
        """For another number of steps, to which the time is nearly proportional."""
        minutes = max(1, round(self.minutes * steps / self.steps))
        return f"needs about {minutes} min and {self.memory:.1f} GiB of memory (on {MACHINE})"


def parser(description: str, needs: Needs) -> argparse.ArgumentParser:
    """With the options of all examples."""
    found = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        epilog=f"With the clips that come along it {needs.text(needs.steps)}; your own videos take more memory: "
        "15 bytes for each pixel of a frame, of all frames.",
    )
    found.add_argument("--steps", type=int, default=needs.steps, help="of training; by default %(default)s")
    found.add_argument("--videos", type=pathlib.Path, help="a folder of videos to learn from, of any format PyAV reads")
    found.add_argument("--fps", type=float, help="frames per second that are read of --videos; by default all")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"), help="a folder for results")
    return found


def start(description: str, options: argparse.Namespace, needs: Needs) -> None:
    """Say what a run does and needs, and make the folder for its results."""
    print(f"{description.partition(chr(10))[0]}\n{options.steps} steps: {needs.text(options.steps)}", flush=True)
    options.outputs.mkdir(parents=True, exist_ok=True)


def verdict(shortfalls: Sequence[str], options: argparse.Namespace, steps: int) -> int:
    """Say in what a run is not good enough; the exit status.

    It fails only with the clips that come along, and at least `steps` steps: what videos of one's own need, nobody
    knows beforehand.
    """
    judged = options.videos is None and options.steps >= steps
    for shortfall in shortfalls:
        if judged:
            print(f"FAILED: {shortfall}", file=sys.stderr)
        else:
            print(f"{shortfall}; a run fails for that only with the clips that come along and {steps} steps or more")
    return int(judged and len(shortfalls) > 0)
