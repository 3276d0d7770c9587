"""From cases and providers to lines: build, gate, time in turns, measure memory."""

import contextlib
import dataclasses
import datetime
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gate import LEEWAY, Gate, Pass, Verdict
from benchmarks.measure import machine_limits, peak_memory, time_interleaved
from benchmarks.records import Line, Measured, environment
from benchmarks.registry import Case, Operator, Provider
from vattn._library import runs_reference

RED = "red at the gate"  # how the reason begins of a provider whose result is wrong
BACKWARD_OVER_FORWARD = 2.5  # five matrix products over two: the scores are computed again


class Entrant:
    """A provider, built for one case and given the case's leaves."""

    def __init__(self, provider: Provider[Any], case: Case, leaves: Sequence[Tensor], grad_out: Tensor) -> None:
        self.provider = provider
        self.case = case
        self.leaves = leaves
        self.grad_out = grad_out
        self.run = provider.build(case, grad_out.device)
        self.inputs = provider.before(case, *leaves)
        # What a limit returns need not look like the output; what stands in for its gradient must.
        self.grad_run = grad_out if provider.role != "limit" else torch.randn_like(self.run(*self.inputs))

    def execute(self, pass_name: Pass) -> tuple[Tensor, ...]:
        """What is timed. Gradients are made contiguous, as the backward of the projection before needs them."""
        if pass_name == "forward":
            with torch.no_grad():
                return (self.run(*self.inputs),)
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        out = self.run(*inputs)
        return out, *(grad.contiguous() for grad in torch.autograd.grad(out, inputs, self.grad_run))

    def judge(self, gate: Gate, pass_name: Pass) -> Verdict:
        """What the gate says of the pass, from the leaves to the output and back."""
        leaves = [leaf.detach().requires_grad_(pass_name != "forward") for leaf in self.leaves]
        out = self.provider.after(self.case, self.run(*self.provider.before(self.case, *leaves)))
        leeway = 1.0 if self.provider.role == "vattn" else LEEWAY
        if pass_name == "forward":
            return gate.judge(out, leeway=leeway)
        grads = torch.autograd.grad(out, leaves, self.grad_out, materialize_grads=True)
        return gate.judge(out.detach(), grads, leeway)


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
        """The lines of all providers on `case`, one pass at a time; without a gradient there is but the forward."""
        generator = torch.Generator(self.device).manual_seed(0)
        *leaves, grad_out = (
            torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            for shape in [*case.leaf_shapes, case.output_shape]
        )
        definitions = {provider.definition for provider in self.providers}
        gates = {definition: Gate(case, leaves, grad_out, definition) for definition in definitions}
        entrants: dict[str, Entrant] = {}
        reasons: dict[str, str] = {}
        for provider in self.providers:
            with _explained(provider.name, reasons):
                entrants[provider.name] = Entrant(provider, case, leaves, grad_out)
        for pass_name in [name for name in passes if name == "forward" or case.output_dtype is None]:
            yield self._measure_pass(case, pass_name, entrants, gates, dict(reasons))

    def _measure_pass(
        self,
        case: Case,
        pass_name: Pass,
        entrants: dict[str, Entrant],
        gates: dict[Callable[..., Tensor], Gate],
        reasons: dict[str, str],
    ) -> list[Line]:
        verdicts: dict[str, Verdict] = {}
        green: dict[str, Callable[[], object]] = {}
        for name, entrant in entrants.items():
            with _explained(name, reasons):
                verdicts[name] = verdict = entrant.judge(gates[entrant.provider.definition], pass_name)
                if verdict.complaint is None:
                    green[name] = functools.partial(entrant.execute, pass_name)
                else:
                    reasons[name] = f"{RED}: {verdict.complaint}"
        memory = {name: peak_memory(function, self.device) for name, function in green.items()}
        limits = machine_limits(self.device, self.dtype)
        functions = green | {name: function for name, (function, _) in limits.items()}
        spreads = time_interleaved(functions, self.device, self.rounds)
        mm, copy = (amount / spreads[name].median for name, (_, amount) in limits.items())

        flops, traffic, needed = _costs(case, pass_name, self.dtype)
        peers = {p.name: spreads[p.name].median for p in self.providers if p.role == "peer" and p.name in green}
        best_peer = min(peers, key=peers.__getitem__, default=None)
        shared = {
            **self.common,
            "kernel": not runs_reference(torch.empty(0, dtype=self.dtype, device=self.device), self.common["operator"]),
            "case": case.name,
            "sizes": dataclasses.asdict(case),  # type: ignore[call-overload]
            "pass_name": pass_name,
            "flops": flops,
            "mm_flops_per_second": mm,
            "copy_bytes_per_second": copy,
            "best_peer": best_peer,
        }
        lines = []
        for provider in self.providers:
            name, measured = provider.name, None
            if name in green:
                spread = spreads[name]
                measured = Measured(
                    **dataclasses.asdict(spread),
                    share_of_mm=flops / spread.median / mm,
                    share_of_copy=traffic / spread.median / copy,
                    extra_memory=None if provider.role == "limit" else memory[name] - needed,
                    speedup=None if best_peer is None else peers[best_peer] / spread.median,
                )
            judged = verdicts.get(name)
            lines.append(
                Line(
                    **shared,
                    provider=name,
                    role=provider.role,
                    reason=reasons.get(name),
                    error=None if judged is None else judged.error,
                    budget=None if judged is None else judged.budget,
                    measured=measured,
                )
            )
        return lines


def _costs(case: Case, pass_name: Pass, dtype: torch.dtype) -> tuple[int, int, int]:
    """FLOP, the bytes that must move and the bytes that must be held: see :class:`records.Measured`."""
    inputs = sum(math.prod(shape) for shape in case.leaf_shapes) * dtype.itemsize
    output = math.prod(case.output_shape) * (case.output_dtype or dtype).itemsize
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
    except Exception as raised:
        error = raised.__cause__ or raised  # the compiler wraps what really went wrong
        first_line = str(error).strip().split("\n")[0][:200]
        reasons[name] = f"unavailable: {type(error).__name__}: {first_line}"
