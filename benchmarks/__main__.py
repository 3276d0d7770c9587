"""The command line: ``python -m benchmarks <operator>`` and ``python -m benchmarks plot <operator>``."""

import argparse
import ast
import dataclasses
import pathlib
import sys
import textwrap
from typing import Any

import torch

from benchmarks import plots, records, report
from benchmarks.choices import case_of, provider_of
from benchmarks.gate import Pass
from benchmarks.harness import Session
from benchmarks.registry import Operator, load_operator, operator_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if vattn was wrong or could not run somewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory of vattn's operators, beside what one would write without them.",
        epilog=_other_programs(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plot, OPERATOR}")
    drawing = commands.add_parser("plot", help="draw the stored lines of an operator")
    drawing.add_argument("operator", choices=operator_names())
    for name in operator_names():
        operator = load_operator(name)
        command = commands.add_parser(
            name,
            help="measure this operator",
            description=f"Measures {name}. A result is timed only where it agrees with the reference.",
            epilog=_explanation(operator),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--device",
            choices=["cpu", "cuda"],
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="default: cuda where there is a GPU",
        )
        command.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
        command.add_argument(
            "--cases", choices=operator.cases, help='a set of cases; default: "default" on cpu, "gpu" on cuda'
        )
        command.add_argument(
            "--case",
            action="append",
            metavar="NAME=VALUE,...",
            help="a case of these sizes instead, the others as in the first default case; may be repeated",
        )
        command.add_argument(
            "--providers", nargs="+", choices=[p.name for p in operator.providers], help="default: all of the device"
        )
        command.add_argument(
            "--provider",
            action="append",
            metavar="FILE.py:FUNCTION",
            help="also measure this: FUNCTION(case, device) returns run(*leaves) -> output, of the shapes below; may "
            "be repeated",
        )
        command.add_argument("--backward", action="store_true", help="measure forward+backward too")
        command.add_argument("--rounds", type=int, default=15, help="how often the providers take turns; default: 15")
        command.add_argument("--no-store", action="store_true", help="print only")
    for command in commands.choices.values():
        command.add_argument(
            "--results",
            type=pathlib.Path,
            default=records.RESULTS,
            help="folder of the stored lines; default: %(default)s",
        )
    options = parser.parse_args(arguments)

    if options.command == "plot":
        for path in plots.plot(options.operator, options.results):
            print(path)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a torch built for it")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    operator = load_operator(options.command)
    try:
        cases = [case_of(operator, text) for text in options.case or []]
        added = [provider_of(text) for text in options.provider or []]
    except ValueError as error:
        parser.error(str(error))
    taken = {provider.name for provider in operator.providers} & {provider.name for provider in added}
    if taken or len({provider.name for provider in added}) < len(added):
        parser.error(f"--provider: a function must have a name of its own, got {[p.name for p in added]}")
    chosen = None if options.providers is None else [*options.providers, *(provider.name for provider in added)]
    operator = dataclasses.replace(operator, providers=[*operator.providers, *added])
    return _measure(options, operator, cases, chosen)


def _measure(
    options: argparse.Namespace, operator: Operator[Any], cases: list[Any], providers: list[str] | None
) -> int:
    on_gpu = options.device == "cuda"
    passes: list[Pass] = ["forward", "forward+backward"] if options.backward else ["forward"]
    lines: list[records.Line] = []
    for name in options.dtype or ["bfloat16" if on_gpu else "float32"]:
        session = Session(operator, DTYPES[name], torch.device(options.device), providers, options.rounds)
        for case in cases or operator.cases[options.cases or ("gpu" if on_gpu else "default")]:
            for measured in session.measure(case, passes):
                print("\n".join([report.table(measured), *operator.remarks(measured)]), end="\n\n", flush=True)
                if not options.no_store:
                    records.store(measured, options.results)
                lines += measured
    print(report.summary(lines))
    return int(any(line.role == "vattn" and line.reason is not None for line in lines))


def _explanation(operator: Operator[Any]) -> str:
    """What the cases, the providers and the columns of the table are."""
    first = operator.cases["default"][0]
    lines = [
        f"sizes of a case: {first.name}",
        f"  run(*leaves) is then given {', '.join(map(str, first.leaf_shapes))}",
        f"  and returns {first.output_shape}",
        "",
        "cases:",
    ]
    lines += [f"  {name}: {len(cases)}, first {cases[0].name}" for name, cases in operator.cases.items()]
    roles = {
        "peer": "peers, what one would write instead (the fastest one is the best peer)",
        "other": "others, compared by themselves",
        "limit": "limits, which do a part of the work only",
    }
    lines += ["", "providers:"]
    for role, meaning in roles.items():
        names = ", ".join(provider.name for provider in operator.providers if provider.role == role)
        lines += textwrap.wrap(f"{meaning}: {names or 'none'}", 100, initial_indent="  ", subsequent_indent="    ")
    lines += ["", "columns:", *(f"  {name:16}  {meaning}" for name, meaning in report.MEANINGS.items())]
    return "\n".join(lines)


def _other_programs() -> str:
    """The first sentence of every module here that is a program of its own."""
    lines = ["other programs, each with --help:"]
    for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        text = path.read_text()
        if "__main__" not in text:
            continue
        sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ").split(": ``python")[0]
        lines += [f"  python -m benchmarks.{path.stem}", f"      {sentence.rstrip('.')}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
