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
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from vattn import _flops
from vattn._library import AUTOCAST_DEVICES, _with_cuda_cpp, compute_dtype, library, note_compiled_kernels
from vattn._replay import Replayed
from vattn._signature import Signature
from vattn._vmap import vmap_rule

OPERATORS: dict[str, "Operator"] = {}
"""The operators that have a public function of the same name, in the order in which they are defined."""


class Operator:
    """One ``torch.library`` op with its derivatives, fakes, autocast rule and ``vmap``. Calling it runs it.

    Args:
        schema: as ``torch.library`` has it, with a name for every result.
        takes: what its arguments must be, see :mod:`vattn._signature`.
        fake: of the arguments: results of the right shape, dtype and strides.
        also: of the arguments by their names: raises where they do not fit each other.
        launch: its CUDA kernel, as "<module of vattn.kernels>.<function>"; None is ``<name>.forward``.
        backward: of (arguments and results by name, gradients of the results or None): gradients of arguments, by name.
        jvp: of (arguments and results by name, tangents of arguments by name, or None): tangents of the results.
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
        kinds = list(enumerate(self.arguments.values()))
        self.has_lists = "Tensor[]" in self.arguments.values()
        self.gives_lists = "Tensor[]" in self.results.values()
        self._tensors = [i for i, kind in kinds if kind.startswith("Tensor")]
        self._varying = [i for i, kind in kinds if kind in ("Tensor?", "Tensor[]")]
        self.sizes_of = sizes_of
        self.nothing = dict.fromkeys([*self.arguments, *self.results])
        self.plain = {i: name for i, name in enumerate(self.arguments) if i not in self._tensors}  # no tensors
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
            library.impl(self.name, launcher(self, launch), "CUDA")

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:  # that of any thread
                raise RuntimeError(f"{self.public_name}: there is no forward mode inside a function that is compiled")
            return self._trace(*args)
        if torch.jit.is_tracing():
            return self.op(*args)
        if self.autocast and torch._C._is_any_autocast_enabled():
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
        """The op for a call with these `args`: itself, or :attr:`traced`."""
        return self.traced if self.traced is not None and isinstance(args[self._floats[0]], Tensor) else self

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors among arguments, and in lists among them."""
        if not self.has_lists:
            return [args[i] for i in self._tensors if args[i] is not None]
        found: list[Tensor] = []
        for i in self._tensors:
            x = args[i]
            if isinstance(x, Tensor):
                found.append(x)
            elif x is not None:
                found += x
        return found

    def structure(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Of arguments that vary, whether they are there, or how many tensors are in their list."""
        return tuple([len(x) if isinstance(x := args[i], (list, tuple)) else x is not None for i in self._varying])

    @property
    def public_name(self) -> str:
        """The name of the public function that it belongs to."""
        return self.name.removesuffix(".traced").removesuffix("_backward").removesuffix("_jvp")

    def run(self, *args: Any) -> Any:
        """The kernel, without derivatives. Its results are not views."""
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.op(*args)

    def _differentiate(self, *args: Any) -> Any:
        """Run it, with derivatives where they are needed."""
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return self._transform(self.tensors(args), args)
        if torch.is_grad_enabled():
            tensors = self.tensors(args)
            for x in tensors:
                if x.requires_grad:
                    return self._record(self._apply_at_once, tensors, args)
        return self.run(*args)

    def _transform(self, tensors: Sequence[Tensor], args: Sequence[Any]) -> Any:
        """Run it in forward mode, or under a transform of ``torch.func``."""
        in_forward_mode = forward_ad._current_level >= 0
        if in_forward_mode and self.jvp and torch.is_inference_mode_enabled() and any(map(_loses_tangent, tensors)):
            raise RuntimeError(f"{self.public_name}: inference mode turns forward mode off, which would lose a tangent")
        transform = peek_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
        if transform is None:
            return self._record(self._apply_at_once, tensors, args)
        if transform.key() == TransformType.Functionalize:
            return self.op(*args)
        return self._record(self._function.apply, tensors, args)

    def _record(self, apply: Callable[..., Any], tensors: Sequence[Tensor], args: Sequence[Any]) -> Any:
        """Run it as a function that is differentiated, or transformed."""
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            # of transforms that have ended
            args, tensors = tree_map_only(Tensor, torch._C._functorch.unwrap_if_dead, (args, tensors))
        results = apply(self, args, *tensors)
        if self.gives_lists:
            return tuple(_nested(results, _kept_of(self, self.structure(args)).results))
        return results[0] if len(results) == 1 else results

    def _differentiate_op(self, *args: Any) -> Any:
        """The same behind the Autograd key, where it is too late for ``torch.func``."""
        if not torch._C._are_functorch_transforms_active():
            return self._differentiate(*args)
        tensors = self.tensors(args)
        if any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
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
    """A call that PyTorch can differentiate and map: (operator, arguments, *the tensors among these)."""

    @staticmethod
    def forward(op: Operator, args: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        results = op.run(*args)
        if isinstance(results, Tensor):
            return (results,)
        return results if not op.gives_lists else _flat(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op, args, *values = inputs
        kept = _kept_of(op, op.structure(args))
        values += output
        tensors = [values[i] for i in kept.tensors]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.call = op, kept, [args[i] for i in op.plain], [values[i].shape for i in kept.sizes]
        if kept.constant:
            ctx.mark_non_differentiable(*(output[i] for i in kept.constant))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, kept, *_ = ctx.call
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * (2 + kept.given)
        _check_direction(op, op.backward, grads)
        found = op.backward(_saved(ctx), _nested(grads, kept.results) if op.gives_lists else grads)
        flat: list[Tensor | None] = [None, None]
        for name, place in kept.arguments.items():
            grad = found.get(name)
            if isinstance(place, int):
                flat.append(grad)
            else:
                flat += [None] * (place.stop - place.start) if grad is None else grad
        return tuple(flat)

    @staticmethod
    def jvp(ctx: Any, _op: None, _args: None, *tangents: Tensor | None) -> Any:
        op, kept, *_ = ctx.call
        _check_direction(op, op.jvp, tangents)
        by_name: dict[str, Any] = dict.fromkeys(op.arguments)
        by_name |= zip(kept.arguments, _nested(tangents, kept.arguments.values()), strict=True)
        return tuple(op.jvp(_saved(ctx), by_name))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Operator, args: Sequence[Any], *tensors: Tensor) -> Any:
        results, out_dims = vmap_rule(op, op, info, in_dims[1], *args)
        if isinstance(results, Tensor):
            return (results,), (out_dims,)
        return _flat(results), tuple(y for x in out_dims for y in (x if isinstance(x, list) else [x]))


def _flat(results: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(y for x in results for y in ((x,) if isinstance(x, Tensor) else x))


class _Kept(NamedTuple):
    """Where tensors are among flat ones, of which lists are slices, and what derivatives read of them."""

    arguments: dict[str, int | slice]  # that are tensors, and are there
    results: list[int | slice]  # from the first of them on
    given: int  # how many tensors are among the arguments
    tensors: list[int]  # that are kept: tensors of arguments, then of results
    kept: dict[str, int | slice]  # where they are among these
    sizes: list[Any]  # of which tensors the sizes are kept
    constant: list[int]  # results without a derivative


@functools.cache
def _kept_of(op: Operator, structure: tuple[Any, ...]) -> _Kept:
    """Of a call of `op` whose arguments vary so."""
    varying = iter(structure)
    counts = {
        name: 1 if kind == "Tensor" else int(next(varying))
        for name, kind in op.arguments.items()
        if kind.startswith("Tensor")
    }
    lists = [counts[name] for name, kind in op.arguments.items() if kind == "Tensor[]"]
    # A result that is a list has the size of the argument that is one.
    of_lists = iter(lists)
    of_results = {name: next(of_lists) if kind == "Tensor[]" else 1 for name, kind in op.results.items()}
    arguments, results = _places(op.arguments, counts), _places(op.results, of_results)
    given = sum(counts.values())
    names = [name for counted in (counts, of_results) for name, count in counted.items() for _ in range(count)]
    tensors = [i for i, name in enumerate(names) if name in op.keeps]
    kept_counts = {name: count for name, count in (counts | of_results).items() if name in op.keeps}
    return _Kept(
        arguments, list(results.values()), given, tensors, _places(op.arguments | op.results, kept_counts),
        [arguments[name] for name in op.sizes_of],
        [i for i, name in enumerate(names[given:]) if name in op.constant],
    )  # fmt: skip


def _places(kinds: Mapping[str, str], counts: Mapping[str, int]) -> dict[str, int | slice]:
    """Where tensors, and lists of them, are among flat ones, by their names, if so many are there of each."""
    places: dict[str, int | slice] = {}
    first = 0
    for name, count in counts.items():
        if kinds[name] == "Tensor[]":
            places[name] = slice(first, first + count)
        elif count > 0:
            places[name] = first
        first += count
    return places


def _nested(flat: Sequence[Any], places: Iterable[int | slice]) -> list[Any]:
    """What is at these places: lists for slices."""
    return [list(flat[i]) if isinstance(i, slice) else flat[i] for i in places]


def _saved(ctx: Any) -> dict[str, Any]:
    """Arguments and results by name; tensors that are not kept, or not there, are None."""
    op, kept, plain, sizes = ctx.call
    saved, tensors = dict(op.nothing), ctx.saved_tensors
    for name, i in kept.kept.items():
        saved[name] = tensors[i] if isinstance(i, int) else list(tensors[i])
    saved.update(zip(op.plain.values(), plain, strict=True))
    saved.update(zip(op.sizes_of, sizes, strict=True))
    return saved


def declared(part: str) -> dict[str, str]:
    """Names and kinds of the arguments of a schema, or of its results: ``(Tensor query, int[] window)``."""
    inside = part.partition("(")[2] if "(" in part else part
    kinds = (item.rsplit(" ", 1) for item in inside.removesuffix(")").split(", "))
    return {name: kind for kind, name in kinds}


def _is_static(x: Any, kind: str) -> bool:
    """Whether `x` is anything but a float that differs between calls of a compiled function."""
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


def launcher(op: Operator, path: str) -> Callable[..., Any]:
    """A function of ``vattn.kernels``, which need Triton: only a GPU does."""
    module, function = path.split(".")

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"vattn.kernels.{module}"), function)(*args)

    def check(*args: Any) -> None:
        op.signature.check(dict(zip(op.arguments, args, strict=True)))

    def launch_checked(*args: Any) -> Any:
        check(*args)
        return launch(*args)

    return launch_checked if os.environ.get("VATTN_REPLAY") == "0" else Replayed(launch, check)


def _loses_tangent(x: Tensor) -> bool:
    """Whether `x` has a tangent, and forward mode is off."""
    if torch._C._is_fwd_grad_enabled():
        return False
    with torch.inference_mode(False):  # which hides tangents
        return forward_ad.unpack_dual(x).tangent is not None


def _check_direction(op: Operator, derivative: object, along: Sequence[Tensor | None]) -> None:
    """Raise unless `op` has this `derivative`, and for gradients, or tangents, such as these."""
    if derivative is None:
        raise RuntimeError(
            f"{op.public_name}: second derivatives need float64 inputs or vattn.use_reference(), to run the reference; "
            "the kernels have first derivatives only (a backward inside a dual level is a second derivative, too)"
        )
    if not op.has_lists or torch.compiler.is_compiling():  # which has no batched gradients
        return
    if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in along):
        raise RuntimeError(
            f"{op.public_name}: batched gradients (is_grads_batched, vectorize) cannot go through tensor lists; "
            "torch.vmap of torch.func.vjp can"
        )
