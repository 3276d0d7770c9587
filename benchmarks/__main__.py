"""The command line: ``python -m benchmarks <operator>`` and ``python -m benchmarks plot <operator>``."""

import argparse
import pathlib
import sys

import torch

from benchmarks import plots, records, report
from benchmarks.gate import Pass
from benchmarks.harness import Session
from benchmarks.registry import load_operator, operator_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if vattn was wrong or could not run somewhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory of vattn's operators.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("plot", help="draw the stored lines of an operator")
    drawing.add_argument("operator", choices=operator_names())
    for name in operator_names():
        command = commands.add_parser(name, help="measure this operator")
        command.add_argument(
            "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
        )
        command.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
        command.add_argument("--cases", choices=load_operator(name).cases, help='default: "gpu" on cuda')
        command.add_argument("--providers", nargs="+", choices=[p.name for p in load_operator(name).providers])
        command.add_argument("--backward", action="store_true", help="measure forward+backward too")
        command.add_argument("--rounds", type=int, default=15, help="how often the providers take turns")
        command.add_argument("--no-store", action="store_true", help="print only")
    for command in commands.choices.values():
        command.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    options = parser.parse_args(arguments)

    if options.command == "plot":
        for path in plots.plot(options.operator, options.results):
            print(path)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a torch built for it")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    operator = load_operator(options.command)
    on_gpu = options.device == "cuda"
    passes: list[Pass] = ["forward", "forward+backward"] if options.backward else ["forward"]
    lines: list[records.Line] = []
    for name in options.dtype or ["bfloat16" if on_gpu else "float32"]:
        session = Session(operator, DTYPES[name], torch.device(options.device), options.providers, options.rounds)
        for case in operator.cases[options.cases or ("gpu" if on_gpu else "default")]:
            for measured in session.measure(case, passes):
                print("\n".join([report.table(measured), *operator.remarks(measured)]), end="\n\n", flush=True)
                if not options.no_store:
                    records.store(measured, options.results)
                lines += measured
    print(report.summary(lines))
    return int(any(line.role == "vattn" and line.reason is not None for line in lines))


if __name__ == "__main__":
    sys.exit(main())
