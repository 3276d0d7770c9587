"""An attention operator from one definition: the schema of its forward, and how many tokens meet.

Its kernels are three ops, whose schemas follow from the first::

    <op>(*inputs, *settings) -> (out, lse, ...)
    <op>_backward(grad_out, grad_lse, *inputs, out, lse, *settings) -> (the gradient of each input)
    <op>_jvp(the tangent of each input, *inputs, out, lse, *settings) -> (out_tangent, lse_tangent)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn._library import empty_rows
from vattn._operator import Operator, declared


class Attention(Operator):
    """An operator whose results are out and lse, with its backward and its tangent.

    Args:
        schema: of the forward. Its first arguments are `inputs`; one that is optional may stand among the settings.
        takes: as for :class:`Operator`, of the arguments of the forward but for what every attention takes.
        inputs: the arguments that have a gradient.
        tokens: how many tokens queries and keys have, a sum in the words of `takes`. Of these and of batches and heads
            `seed` may hold the numbers, see :func:`vattn.reference.dropout.numbered`.
        pairs: of the arguments, by their names: how many pairs of a query and a key meet. In a product of matrices, a
            pair takes a multiplication and an addition for each channel. The forward has two products, the others five.
        fake: as for :class:`Operator`, if not that of rows.
        like: of the name and the value of an input, or of out: an empty tensor for its gradient, or its tangent.
        settings: as for :class:`Operator`.
    """

    def __init__(
        self,
        schema: str,
        *,
        takes: Mapping[str, str],
        inputs: Sequence[str] = ("query", "key", "value"),
        tokens: str = "",
        pairs: Callable[..., int] | None = None,
        fake: Callable[..., Any] | None = None,
        like: Callable[[str, Tensor], Tensor] | None = None,
        autocast: Sequence[str] = (),
        shared: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        name = schema.split("(")[0]
        kinds, results = (declared(part) for part in schema.split(" -> "))
        self._inputs, self._optional = inputs, [x for x in inputs if kinds[x] == "Tensor?"]
        leading = [x for x in kinds if x in inputs and x not in self._optional]
        rest = [x for x in kinds if x not in leading]
        self._primals = [*leading, *list(results)[:2], *rest]
        self.pairs, self._empty = pairs, like or _like_rows
        kept = [x for x, kind in kinds.items() if kind.startswith("Tensor")]
        takes = {**takes, "dropout_p": "0 .. 1", "seed": f"1 | 1+B*H+{tokens}: int64", "scale": "finite"}
        super().__init__(
            schema, takes=takes, fake=fake or _fake, backward=self._backward, jvp=self._jvp,
            keeps=[*kept, "out", "lse"], constant=list(results)[2:], flops=self._flops(products=2), autocast=autocast,
            shared=[*shared, "seed"], **settings,
        )  # fmt: skip

        grads = {x: f"grad_{x}" for x in inputs}
        tangents = {x: f"{x[:-1]}_tangents" if kinds[x] == "Tensor[]" else f"{x}_tangent" for x in inputs}
        of_optional = [names[x] for names in (grads, tangents) for x in self._optional]
        rows = takes[leading[0]]
        takes |= dict.fromkeys(("out", "grad_out"), rows)
        takes |= dict.fromkeys(("lse", "grad_lse"), f"{rows.rpartition(' ')[0]}: float32")
        takes |= {named: takes[x] for names in (grads, tangents) for x, named in names.items()}
        derived: dict[str, Any] = settings | {
            "takes": takes, "flops": self._flops(products=5), "shared": [*shared, "seed", *of_optional],
            "public": False,
        }  # fmt: skip
        primals = [f"{kinds[x]} {x}" for x in leading] + ["Tensor out", "Tensor lse"]
        primals += [f"{kinds[x]} {x}" for x in rest]
        taken = ", ".join(["Tensor grad_out", "Tensor? grad_lse", *primals])
        given = ", ".join(f"{kinds[x].removesuffix('?')} {grad}" for x, grad in grads.items())
        self.backward_op = Operator(
            f"{name}_backward({taken}) -> ({given})",
            fake=self._fake_backward, launch=f"{name}.backward", **derived,
        )  # fmt: skip
        taken = ", ".join([f"{kinds[x]} {tangent}" for x, tangent in tangents.items()] + primals)
        self.jvp_op = Operator(
            f"{name}_jvp({taken}) -> (Tensor out_tangent, Tensor lse_tangent)",
            fake=self._fake_jvp, launch=f"{name}.jvp", **derived,
        )  # fmt: skip

    def _backward(self, saved: dict[str, Any], grads: Sequence[Any]) -> dict[str, Any]:
        grad_out = _zeros(saved["out"]) if grads[0] is None else grads[0]
        found = self.backward_op.fitting(saved)(grad_out, grads[1], *[saved[x] for x in self._primals])
        return {x: grad for x, grad in zip(self._inputs, found, strict=True) if saved[x] is not None}

    def _jvp(self, saved: dict[str, Any], tangents: dict[str, Any]) -> list[Any]:
        along = [tangents[x] if x in self._optional else _or_zeros(tangents[x], saved[x]) for x in self._inputs]
        found = self.jvp_op.fitting(saved)(*along, *[saved[x] for x in self._primals])
        return [*found, *[None] * len(self.constant)]

    def _flops(self, products: int) -> Callable[..., int] | None:
        if self.pairs is None:
            return None
        count, first = self.pairs, self._primals[0]
        return lambda **args: 2 * products * count(**args) * args[first].shape[-1]

    def _fake_backward(self, *args: Any) -> tuple[Any, ...]:
        by_name = dict(zip(self.backward_op.arguments, args, strict=True))
        nothing = by_name["out"].new_empty(0, dtype=torch.float32)
        return tuple(nothing if by_name[x] is None else self._like(x, by_name[x]) for x in self._inputs)

    def _fake_jvp(self, *args: Any) -> tuple[Tensor, Tensor]:
        by_name = dict(zip(self.jvp_op.arguments, args, strict=True))
        return self._like("out", by_name["out"]), by_name["lse"].new_empty(by_name["lse"].shape)

    def _like(self, name: str, x: Any) -> Any:
        return self._empty(name, x) if isinstance(x, Tensor) else [self._empty(name, y) for y in x]


def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _like_rows(name: str, x: Tensor) -> Tensor:
    """As :func:`empty_rows` of rows (B, H, ..., D); as it lies, of what has fewer axes."""
    return empty_rows(x) if x.dim() > 3 else torch.empty_like(x)


def _zeros(like: Tensor) -> Tensor:
    """Zeros of the shape of `like`, in the memory of one row."""
    return like.new_zeros(like.shape[-1:]).expand(like.shape)


def _or_zeros(tangent: Any, primal: Any) -> Any:
    if isinstance(primal, Tensor):
        return _zeros(primal) if tangent is None else tangent
    return [_or_zeros(*each) for each in zip(tangent, primal, strict=True)]
