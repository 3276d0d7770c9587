"""An operator of PyTorch from one definition: its schema, and what its kernels compute.

From it follow the launchers of the kernels, what they return for fake tensors, the autocast rule, derivatives in both
modes, ``vmap``, the count of floating-point operations, and an entry in :data:`OPERATORS`::

    public function -> Operator -> torch.ops.vattn.<name> -> CPU: vattn._C      CUDA: vattn.kernels.<name>

A call takes one of two ways. While PyTorch compiles, and where nothing is differentiated, it is the ``torch.library``
op at once. Otherwise it is :class:`_Differentiable`, an ``autograd.Function`` that runs the op below autograd: the
transforms of ``torch.func`` see into such a function, but not into an op. The op has the same function behind its
Autograd key.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from vattn import _flops
from vattn._library import AUTOCAST_DEVICES, _with_cuda_cpp, compute_dtype, library, note_compiled_kernels
from vattn._signature import Signature
from vattn._vmap import vmap_rule

OPERATORS: dict[str, "Operator"] = {}
"""The operators that have a public function of the same name, in the order in which they are defined."""


class Operator:
    """One ``torch.library`` op, and all that PyTorch asks of it. Calling it runs it.

    Args:
        schema: as ``torch.library`` has it, with a name for every result.
        takes: what its arguments must be, see :mod:`vattn._signature`.
        fake: of the arguments: results of the right shape, dtype and strides.
        also: of the arguments by their names: raises where they do not fit each other.
        launch: its CUDA kernel, as "<module of vattn.kernels>.<function>"; None is ``<name>.forward``.
        backward: of (arguments by name, results, gradients of the results or None): gradients of arguments, by name.
        jvp: of (arguments by name, results, tangents of arguments by name, or None): tangents of the results.
        keeps: the tensors among arguments and results that `backward` and `jvp` read; others come as None.
        sizes_of: tensors among arguments of which they read no more than the shape; this comes in their place.
        constant: results that have no derivative.
        autocast: arguments, tensors or lists of them, that are cast under autocast.
        autocast_to: the dtype that they are cast to, if not that of autocast.
        shared: arguments and results that all samples share. Other tensors begin with an axis of samples.
        any_axes: whether those may begin with any axes at all, instead of one of samples.
        flops: of the arguments, by their names: how many floating-point operations it takes; None where nobody counts.
        public: whether it belongs to :data:`OPERATORS`.

    Attributes:
        traced: the same with tensors for its settings that are floats. A graph that is compiled holds it where these
            differ from call to call: PyTorch compiles an op anew for every value of a float.
    """

    traced: "Operator | None" = None

    def __init__(
        self,
        schema: str,
        *,
        takes: Mapping[str, str],
        also: Callable[..., None] | None = None,
        fake: Callable[..., Any],
        launch: str | None = None,
        backward: Callable[..., Mapping[str, Any]] | None = None,
        jvp: Callable[..., Sequence[Any]] | None = None,
        keeps: Sequence[str] = (),
        sizes_of: Sequence[str] = (),
        constant: Sequence[str] = (),
        autocast: Sequence[str] = (),
        autocast_to: torch.dtype | None = None,
        shared: Sequence[str] = (),
        any_axes: bool = False,
        flops: Callable[..., int] | None = None,
        public: bool = True,
    ) -> None:
        library.define(schema)
        self.name = schema.split("(")[0]
        self.arguments, self.results = (declared(part) for part in schema.split(" -> "))
        packet, _, overload = self.name.partition(".")
        self.op = getattr(getattr(torch.ops.vattn, packet), overload or "default")
        self.signature = Signature(self.public_name, self.arguments, takes, also)
        self.backward, self.jvp, self.keeps, self.constant = backward, jvp, keeps, constant
        self.autocast, self.autocast_to, self.shared, self.any_axes = autocast, autocast_to, shared, any_axes
        self._has_lists = "Tensor[]" in self.arguments.values()
        self.sizes_of = [list(self.arguments).index(name) for name in sizes_of]  # without lists, also among flat ones
        # A class of its own, whose name profilers and errors show.
        self._function: type[torch.autograd.Function] = type(self.name.title().replace("_", ""), (_Differentiable,), {})
        # Function.apply inspects the signature of `forward` in every call, for a third of the time of a small one.
        self._apply_at_once = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        self._add_kernels(launch or f"{self.name}.forward")
        library.impl(self.name, self._differentiate_op, "Autograd")
        for device_type in AUTOCAST_DEVICES if autocast else ():
            rule = functools.partial(self._run_autocast, self.op, device_type)
            library.impl(self.name, rule, f"Autocast{device_type.upper()}")
        qualified = f"vattn::{self.name}"
        torch.library.register_fake(qualified, functools.partial(_run_fake, self, fake), lib=library)
        torch.library.register_vmap(qualified, functools.partial(vmap_rule, self, self.op), lib=library)
        self._floats = floats = [name for name, kind in self.arguments.items() if kind == "float"]
        if floats:
            self.traced = _Traced(
                self, schema.replace("(", ".traced(", 1).replace("float ", "Tensor "), takes=takes, fake=fake,
                backward=backward, jvp=jvp, keeps=[*keeps, *floats], sizes_of=sizes_of, constant=constant,
                autocast=autocast, autocast_to=autocast_to, shared=[*shared, *floats], any_axes=any_axes, public=False,
            )  # fmt: skip
        if flops is not None:
            _flops.register(self.op.overloadpacket, functools.partial(self._count, flops))
        if public:
            OPERATORS[self.name] = self

    def _add_kernels(self, launch: str) -> None:
        note_compiled_kernels(self.name, self.arguments.values())
        if self.name not in _with_cuda_cpp:  # a kernel of vattn._C_cuda comes before the launcher
            library.impl(self.name, functools.partial(_launch, self, launch), "CUDA")

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:  # that of any thread
                raise RuntimeError(f"{self.public_name}: there is no forward mode inside a function that is compiled")
            return self._trace(*args)
        if torch.jit.is_tracing():
            return self.op(*args)
        if self.autocast:
            device_type = self.tensors(args)[0].device.type
            if device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
                return self._run_autocast(self._differentiate, device_type, *args)
        return self._differentiate(*args)

    def _trace(self, *args: Any) -> Any:
        """Put it into the graph of a function that is compiled."""
        if self.traced is None or all(map(_is_static, args, self.arguments.values())):
            return self.op(*args)
        return self.traced.op(*map(_as_tensor, args, self.arguments.values()))

    def fitting(self, args: Mapping[str, Any]) -> "Operator":
        """The one of both that `args`, those of a call by their names, are for: itself, or :attr:`traced`."""
        return self.traced if self.traced is not None and isinstance(args[self._floats[0]], Tensor) else self

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        """Arguments with the elements of lists of tensors in place of the lists."""
        if not self._has_lists:
            return args
        kinds = self.arguments.values()
        return [y for x, kind in zip(args, kinds, strict=True) for y in (x if kind == "Tensor[]" else (x,))]

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The sizes of lists of tensors; a result that is a list has the size of the argument that is one."""
        return tuple(len(x) for x, kind in zip(args, self.arguments.values(), strict=True) if kind == "Tensor[]")

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors among arguments, and in lists among them."""
        return [x for x in self.flat(args) if isinstance(x, Tensor)]

    @property
    def public_name(self) -> str:
        """The name of the public function that it belongs to."""
        return self.name.removesuffix(".traced").removesuffix("_backward").removesuffix("_jvp")

    def run(self, *args: Any) -> Any:
        """The kernel, without derivatives. Its results are no views, whatever it does to lay them out."""
        if self._has_lists and any(map(torch._C._functorch.is_legacy_batchedtensor, self.tensors(args))):
            raise RuntimeError(
                f"{self.public_name}: batched gradients (is_grads_batched, vectorize) cannot go through tensor lists; "
                "torch.vmap of torch.func.vjp can"
            )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.op(*args)

    def _differentiate(self, *args: Any) -> Any:
        """Run it, with derivatives where somebody asks for them."""
        tensors = self.tensors(args)
        in_forward_mode = forward_ad._current_level >= 0
        if in_forward_mode and self.jvp and torch.is_inference_mode_enabled() and any(map(_loses_tangent, tensors)):
            raise RuntimeError(f"{self.public_name}: inference mode turns forward mode off, which would lose a tangent")
        transform = peek_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
        if transform is not None and transform.key() == TransformType.Functionalize:
            return self.op(*args)
        if not (
            transform is not None
            or in_forward_mode
            or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        ):
            return self.run(*args)
        sizes = self.sizes(args) if self._has_lists else ()
        apply = self._apply_at_once if transform is None else self._function.apply
        flat = unwrap_dead_wrappers(tuple(self.flat(args)))  # of transforms that have ended
        results = nested(self.results, apply(self, sizes, *flat), sizes)
        return results[0] if len(results) == 1 else tuple(results)

    def _differentiate_op(self, *args: Any) -> Any:
        """The same behind the Autograd key, where it is too late for ``torch.func``."""
        if not torch._C._are_functorch_transforms_active():
            return self._differentiate(*args)
        if any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in self.tensors(args)):
            raise RuntimeError(
                f"{self.public_name}: torch.func transforms calls of vattn.{self.public_name}, but neither of "
                "torch.ops.vattn nor inside a function that is compiled"
            )
        return self.run(*args)

    def _run_autocast(self, run: Callable[..., Any], device_type: str, *args: Any) -> Any:
        def cast(x: Any) -> Any:
            return x.to(self.autocast_to or compute_dtype(x)) if isinstance(x, Tensor) else [cast(y) for y in x]

        args = tuple(cast(x) if name in self.autocast else x for name, x in zip(self.arguments, args, strict=True))
        with torch.autocast(device_type, enabled=False):
            return run(*args)

    def _count(self, flops: Callable[..., int], *args: Any, out_val: Any = None, **named: Any) -> int:
        return flops(**dict(zip(self.arguments, args, strict=False)), **named)


class _Traced(Operator):
    """See :attr:`Operator.traced`. Its kernel reads the tensors, which are on the CPU, and runs the operator's."""

    def __init__(self, of: Operator, schema: str, **settings: Any) -> None:
        self._of = of
        super().__init__(schema, **settings)

    def _add_kernels(self, launch: str) -> None:
        kinds = self._of.arguments.values()

        def run(*args: Any) -> Any:
            return self._of.op(*(x.item() if kind == "float" else x for x, kind in zip(args, kinds, strict=True)))

        library.impl(self.name, run, "CompositeExplicitAutograd")


class _Differentiable(torch.autograd.Function):
    """A call that PyTorch can differentiate and map: (operator, sizes of lists, *flat arguments)."""

    @staticmethod
    def forward(op: Operator, sizes: tuple[int, ...], *flat: Any) -> tuple[Tensor, ...]:
        results = op.run(*nested(op.arguments, flat, sizes))
        results = (results,) if isinstance(results, Tensor) else results
        return tuple(y for x in results for y in ((x,) if isinstance(x, Tensor) else x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.sizes, *flat = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in flat]
        for i in ctx.op.sizes_of:
            ctx.others[i] = flat[i].shape
        keeps = _flags(ctx.op, ctx.sizes)
        kept = [x if keep and isinstance(x, Tensor) else None for keep, x in zip(keeps, [*flat, *output], strict=True)]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        if ctx.op.constant:
            results = zip(_flat_names(ctx.op.results, ctx.sizes), output, strict=True)
            ctx.mark_non_differentiable(*(x for name, x in results if name in ctx.op.constant))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op: Operator = ctx.op
        if all(grad is None for grad in grads):
            return None, None, *(None for _ in ctx.others)
        if op.backward is None:
            raise RuntimeError(_second_derivatives(op))
        found = op.backward(*_kept(ctx), nested(op.results, grads, ctx.sizes))
        nothing = nested(op.arguments, [None] * len(ctx.others), ctx.sizes)
        by_argument = zip(op.arguments, nothing, strict=True)
        return None, None, *op.flat([found.get(name, none) for name, none in by_argument])

    @staticmethod
    def jvp(ctx: Any, _op: None, _sizes: None, *tangents: Tensor | None) -> Any:
        op: Operator = ctx.op
        if op.jvp is None:
            raise RuntimeError(_second_derivatives(op))
        by_name = dict(zip(op.arguments, nested(op.arguments, tangents, ctx.sizes), strict=True))
        return tuple(op.jvp(*_kept(ctx), by_name))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Operator, sizes: tuple[int, ...], *flat: Any) -> Any:
        dims = nested(op.arguments, in_dims[2:], sizes)
        results, out_dims = vmap_rule(op, op, info, dims, *nested(op.arguments, flat, sizes))
        if isinstance(results, Tensor):
            return (results,), (out_dims,)
        flat_results = tuple(y for x in results for y in ([x] if isinstance(x, Tensor) else x))
        return flat_results, tuple(y for x in out_dims for y in (x if isinstance(x, list) else [x]))


def nested(kinds: Mapping[str, str], flat: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """The values of arguments or results of these `kinds`, with lists of `sizes` where a kind is ``Tensor[]``."""
    if "Tensor[]" not in kinds.values():
        return list(flat)
    rest, left, values = iter(flat), iter(sizes), []
    for kind in kinds.values():
        values.append([next(rest) for _ in range(next(left))] if kind == "Tensor[]" else next(rest))
    return values


def _flat_names(kinds: Mapping[str, str], sizes: Sequence[int]) -> list[str]:
    left = iter(sizes)
    return [name for name, kind in kinds.items() for _ in range(next(left) if kind == "Tensor[]" else 1)]


@functools.cache
def _flags(op: Operator, sizes: tuple[int, ...]) -> list[bool]:
    """Which of the flat arguments and results are kept for derivatives."""
    return [name in op.keeps for kinds in (op.arguments, op.results) for name in _flat_names(kinds, sizes)]


def _kept(ctx: Any) -> tuple[dict[str, Any], list[Any]]:
    """Arguments by name, and results, less the tensors that are not kept."""
    op, saved = ctx.op, ctx.saved_tensors
    flat = [x if other is None else other for x, other in zip(saved, ctx.others, strict=False)]
    args = dict(zip(op.arguments, nested(op.arguments, flat, ctx.sizes), strict=True))
    return args, nested(op.results, saved[len(ctx.others) :], ctx.sizes)


def declared(part: str) -> dict[str, str]:
    """Names and kinds of the arguments of a schema, or of its results: ``(Tensor query, int[] window)``."""
    inside = part.partition("(")[2] if "(" in part else part
    kinds = (item.rsplit(" ", 1) for item in inside.removesuffix(")").split(", "))
    return {name: kind for kind, name in kinds}


def _is_static(x: Any, kind: str) -> bool:
    """Whether `x` is no float that differs from call to call of a function that is compiled."""
    if kind != "float":
        return True
    return not isinstance(x, Tensor) and torch.fx.experimental.symbolic_shapes.has_static_value(x)


def _as_tensor(x: Any, kind: str) -> Any:
    """A float as a tensor: the product, because PyTorch makes a constant of what goes into ``torch.scalar_tensor``."""
    if kind != "float" or isinstance(x, Tensor):
        return x
    return torch.ones((), dtype=torch.float64, device="cpu") * x


def _run_fake(op: Operator, fake: Callable[..., Any], *args: Any) -> Any:
    """Results of the right shape. One tensor on "meta" among others leads here, too, and is refused."""
    device = op.tensors(args)[0].device
    for (name, kind), x in zip(op.arguments.items(), args, strict=True):
        for y in x if kind == "Tensor[]" else (x,):
            if isinstance(y, Tensor) and y.device != device and not (y.dim() == 0 and y.device.type == "cpu"):
                raise ValueError(f"{op.public_name}: {name} must be on device {device}, got {name}.device={y.device}")
    return fake(*args)


def _launch(op: Operator, path: str, *args: Any) -> Any:
    """A function of ``vattn.kernels``, which need Triton: only a GPU does."""
    op.signature.check(dict(zip(op.arguments, args, strict=True)))
    module, function = path.split(".")
    return getattr(importlib.import_module(f"vattn.kernels.{module}"), function)(*args)


def _loses_tangent(x: Tensor) -> bool:
    """Whether `x` has a tangent, and forward mode is off."""
    if torch._C._is_fwd_grad_enabled():
        return False
    with torch.inference_mode(False):  # which hides tangents
        return forward_ad.unpack_dual(x).tangent is not None


def _second_derivatives(op: Operator) -> str:
    return (
        f"{op.public_name}: second derivatives need float64 inputs, which run the reference; the kernels have first "
        "derivatives only (a backward inside a dual level is a second derivative, too)"
    )
