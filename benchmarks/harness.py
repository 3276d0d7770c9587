"""From cases and providers to lines: build, gate, time in turns, measure memory."""

import contextlib
import dataclasses
import datetime
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gate import Gate, Pass, Verdict
from benchmarks.measure import machine_limits, peak_memory, time_interleaved
from benchmarks.records import Line, environment
from benchmarks.registry import Case, Operator, Provider
from vattn._library import runs_reference

BACKWARD_OVER_FORWARD = 2.5  # five matrix products over two: the scores are computed again


class Entrant:
    """A provider, built for one case and given the case's leaves."""

    def __init__(self, provider: Provider[Any], case: Case, leaves: tuple[Tensor, ...], grad_out: Tensor) -> None:
        self.provider = provider
        self.case = case
        self.leaves = leaves
        self.grad_out = grad_out
        self.run = provider.build(case, leaves[0].device)
        with torch.no_grad():
            self.inputs = tuple(x.detach().requires_grad_() for x in provider.before(case, *leaves))
            # What a limit returns need not look like the output; what stands in for its gradient must.
            self.grad_run = grad_out if provider.role != "limit" else torch.randn_like(self.run(*self.inputs))

    def execute(self, pass_name: Pass) -> tuple[Tensor, ...]:
        """What is timed. Gradients are made contiguous, as the backward of the projection before needs them."""
        if pass_name == "forward":
            with torch.no_grad():
                return (self.run(*self.inputs),)
        out = self.run(*self.inputs)
        grads = torch.autograd.grad(out, self.inputs, self.grad_run)
        return out, *(grad.contiguous() for grad in grads)

    def judge(self, gate: Gate, pass_name: Pass) -> Verdict:
        """What the gate says of the pass, from the leaves to the output and back."""
        with torch.set_grad_enabled(pass_name != "forward"):
            out = self.provider.after(self.case, self.run(*self.provider.before(self.case, *self.leaves)))
        if pass_name == "forward":
            return gate.judge(out)
        return gate.judge(out.detach(), torch.autograd.grad(out, self.leaves, self.grad_out))


class Session:
    """One run: what all its lines share. Lines of one case and pass are measured in the same rounds."""

    def __init__(
        self,
        operator: Operator[Any],
        dtype: torch.dtype,
        device: torch.device,
        provider_names: Sequence[str] | None = None,
        rounds: int = 15,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.rounds = rounds
        self.providers = [
            provider
            for provider in operator.providers
            if device.type in provider.devices and (provider_names is None or provider.name in provider_names)
        ]
        self.common = {
            "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **environment(device),
            "operator": operator.name,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def measure(self, case: Case, passes: Sequence[Pass]) -> Iterator[list[Line]]:
        """The lines of all providers on `case`, one pass at a time."""
        generator = torch.Generator().manual_seed(0)
        *leaves, grad_out = (
            torch.randn(shape, generator=generator).to(self.device, self.dtype)
            for shape in [*case.leaf_shapes, case.output_shape]
        )
        inputs = tuple(leaf.requires_grad_() for leaf in leaves)
        gate = Gate(case, inputs, grad_out)
        entrants: dict[str, Entrant] = {}
        reasons: dict[str, str] = {}
        for provider in self.providers:
            with _explained(provider.name, reasons):
                entrants[provider.name] = Entrant(provider, case, inputs, grad_out)
        for pass_name in passes:
            yield self._measure_pass(case, pass_name, entrants, gate, dict(reasons))

    def _measure_pass(
        self, case: Case, pass_name: Pass, entrants: dict[str, Entrant], gate: Gate, reasons: dict[str, str]
    ) -> list[Line]:
        verdicts: dict[str, Verdict] = {}
        for name, entrant in entrants.items():
            with _explained(name, reasons):
                verdicts[name] = verdict = entrant.judge(gate, pass_name)
                if verdict.complaint is not None:
                    reasons[name] = f"red at the gate: {verdict.complaint}"
        green = {name: functools.partial(e.execute, pass_name) for name, e in entrants.items() if name not in reasons}
        memory = {name: peak_memory(function, self.device) for name, function in green.items()}
        machine = machine_limits(self.device, self.dtype)
        functions = {**green, **{limit: function for limit, (function, _) in machine.items()}}
        spreads = time_interleaved(functions, self.device, self.rounds)
        rates = {limit: amount / spreads[limit].median for limit, (_, amount) in machine.items()}

        flops, traffic, needed = _costs(case, pass_name, self.dtype)
        peers = {p.name: spreads[p.name].median for p in self.providers if p.role == "peer" and p.name in green}
        best_peer = min(peers, key=peers.__getitem__, default=None)
        lines = []
        for provider in self.providers:
            verdict, spread = verdicts.get(provider.name), spreads.get(provider.name)
            lines.append(
                Line(
                    **self.common,
                    kernel=not runs_reference(gate.grad_out),
                    case=case.name,
                    sizes=dataclasses.asdict(case),  # type: ignore[call-overload]
                    pass_name=pass_name,
                    provider=provider.name,
                    role=provider.role,
                    reason=reasons.get(provider.name),
                    error=verdict and verdict.error,
                    budget=verdict and verdict.budget,
                    median=spread and spread.median,
                    p20=spread and spread.p20,
                    p80=spread and spread.p80,
                    samples=spread.samples if spread else 0,
                    flops=flops,
                    share_of_mm=spread and flops / spread.median / rates["mm"],
                    share_of_copy=spread and traffic / spread.median / rates["copy"],
                    mm_flops_per_second=rates["mm"],
                    copy_bytes_per_second=rates["copy"],
                    extra_memory=memory[provider.name] - needed if spread and provider.role != "limit" else None,
                    best_peer=best_peer,
                    speedup=peers[best_peer] / spread.median if spread and best_peer else None,
                )
            )
        return lines


def _costs(case: Case, pass_name: Pass, dtype: torch.dtype) -> tuple[int, int, int]:
    """FLOP, the bytes that must move and the bytes that must be held: see :class:`records.Line`."""
    inputs = sum(math.prod(shape) for shape in case.leaf_shapes) * dtype.itemsize
    output = math.prod(case.output_shape) * dtype.itemsize
    lse = case.num_rows * 4
    if pass_name == "forward":
        return case.forward_flops, inputs + output, output + lse
    # The backward reads inputs, output and its gradient, and writes the gradients of the inputs.
    flops = round(case.forward_flops * (1 + BACKWARD_OVER_FORWARD))
    return flops, 3 * (inputs + output), output + 2 * lse + 2 * inputs


@contextlib.contextmanager
def _explained(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """A provider that cannot run here does not end the run; `reasons` says why."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().split("\n")[0][:200]
        reasons[name] = f"unavailable: {type(error).__name__}: {first_line}"
