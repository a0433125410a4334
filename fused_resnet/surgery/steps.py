"""What a fused chain does in a training step, kernel by kernel, and what each moves and computes.

Nothing is counted by hand: the schedule itself runs, forward and backward, on tensors without data, and every operation
that it asks for is noted.  A tensor counts once for each kernel that reads it and once for each that writes it, in
full; what a cache saves is not seen.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import ops
from fused_resnet.blocks.fusion import plan_of
from fused_resnet.blocks.layers import child
from fused_resnet.blocks.mixin import FusedModule
from fused_resnet.blocks.module import PreparedChains
from fused_resnet.blocks.plan import Plan
from fused_resnet.blocks.prepare import PreparedChain, prepare
from fused_resnet.chain.schedule import backward, forward
from fused_resnet.chain.spec import make_chain
from fused_resnet.ops.library import dense

# operations that give memory and move nothing
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Step(NamedTuple):
    """A kernel: the operation, the activations that it reads and writes [N, C, H, W], its bytes and its FLOP."""

    name: str
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    bytes: int
    flop: int

    @property
    def is_small(self) -> bool:
        """Whether it touches vectors of channels and weights alone."""
        return not self.reads and not self.writes


@dataclass(frozen=True)
class Steps:
    """The kernels of one chain, in order, and the bytes that it keeps for backward, its output included."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    kept: int

    @property
    def bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(step.bytes for step in (*self.forward, *self.backward))

    @property
    def flop(self) -> int:
        """Floating-point operations of all kernels, those included that are done twice to keep less."""
        return sum(step.flop for step in (*self.forward, *self.backward))

    def __add__(self, other: "Steps") -> "Steps":
        return Steps(self.forward + other.forward, self.backward + other.backward, self.kept + other.kept)

    def __str__(self) -> str:
        return "\n".join(
            line
            for phase, steps in (("forward", self.forward), ("backward", self.backward))
            for line in (f"{phase:<30}{'reads':>26}    {'writes':<20}{'MB':>10}{'GFLOP':>9}", *_lines(steps))
        )


def _lines(steps: Sequence[Step]) -> Iterator[str]:
    small = [step for step in steps if step.is_small]
    for step in steps:
        if not step.is_small:
            yield _line(step.name, _shapes(step.reads), _shapes(step.writes), step.bytes, step.flop)
    if small:
        totals = sum(step.bytes for step in small), sum(step.flop for step in small)
        yield _line(f"{len(small)} on vectors and weights", "", "", *totals)


def _line(name: str, reads: str, writes: str, bytes: int, flop: int) -> str:
    work = f"{flop / 1e9:9.2f}" if flop else ""
    return f"  {name:<28}{reads:>26}  {'→' if writes else ' '} {writes:<20}{bytes / 1e6:10.1f}{work}"


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    """Write activations by channels and size: ``256×56×56``, or ``2 of 256×56×56``."""
    counts: dict[str, int] = {}
    for _, *rest in shapes:
        text = "×".join(map(str, rest))
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(text if n == 1 else f"{n} of {text}" for text, n in counts.items())


def trace(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
    *,
    input_grad: bool = False,
    engine: str = "auto",
) -> dict[tuple[str, int], Steps]:
    """Trace the fused chains of a model.

    Parameters
    ----------
    model
        On any device; it is not changed.
    input_shape
        Of its input, [N, C, H, W].
    dtype
        That autocast gives the convolutions; None for none.
    input_grad
        Whether the input has a gradient.
    engine
        Trace as if this one served, which need not be possible here; ``"auto"`` for the one that serves.

    Returns
    -------
    The steps of every chain that the forward reaches, by its module's name and its place in the module; those of all
    calls where the module is called more than once.

    Raises
    ------
    ValueError
        The model does not take such an input.
    """
    mode = FakeTensorMode()
    groups = [module.process_group for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    with FakeCopyMode(mode):
        model = copy.deepcopy(model, {id(group): group for group in groups})  # which cannot be copied
    synchronized = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    names = {module: name for name, module in model.named_modules() if isinstance(module, FusedModule)}
    parameter = next(model.parameters())
    autocast = torch.autocast(parameter.device.type, dtype, enabled=dtype is not None)
    calls: list[tuple[FusedModule, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, FusedModule) and len(args) == 1 and isinstance(args[0], Tensor):
            calls.append((module, args[0]))

    found: dict[tuple[str, int], Steps] = {}
    with mode:
        x = torch.empty(tuple(input_shape), dtype=parameter.dtype, device=parameter.device)
        x = dense(x, True).requires_grad_(input_grad)
        # a fused module is stock to a tensor without data: one forward shows every module its input
        hook = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            with autocast, _in_eval(synchronized):
                model(x)
        except Exception as error:
            raise ValueError(f"{type(model).__name__} takes no input of shape {tuple(input_shape)}: {error}") from error
        finally:
            hook.remove()
        inside: set[nn.Module] = set()  # a chain of another module
        for module, argument in calls:
            plan = plan_of(module)
            chains = "" if plan is None else prepare(module, plan)
            if plan is not None and not isinstance(chains, str) and module not in inside:
                inside |= {child(module, path[:n]) for path in plan.modules for n in range(1, len(path))}
                tracer = _Tracer(module, plan, chains, engine)
                with autocast, _in_eval(synchronized):
                    plan.forward(module, tracer, argument)
                for index, steps in tracer.steps:
                    key = names[module], index
                    found[key] = found[key] + steps if key in found else steps
    return found


@contextlib.contextmanager
def _in_eval(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Keep stock's synchronised norms from sending tensors without data to other processes."""
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


class _Tracer(PreparedChains):
    """The chains of one call, which a generated forward runs on tensors without data."""

    def __init__(self, module: nn.Module, plan: Plan, chains: list[PreparedChain | str], engine: str):
        super().__init__(module, plan, chains)
        self.engine = engine
        self.steps: list[tuple[int, Steps]] = []

    def run(self, index: int, x: Tensor, shortcut: Tensor | None) -> Tensor:
        self.index = index
        return super().run(index, x, shortcut)

    def serves(self, chain: PreparedChain, x: Tensor) -> bool:
        return True  # the input's dtype is nothing to what a chain moves

    def _run(self, chain: PreparedChain, x: Tensor, shortcut: Tensor | None) -> Tensor:
        spec = make_chain(chain.signature)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            if self.engine == "auto":
                k = ops.fakes(spec.options.engine, x.device.type, x.dtype, x.dim())
            else:
                k = ops.fakes_of(self.engine, x.dim())
            with Recorder(chain.parameters) as recorder:
                k = _noted(k, recorder)
                output, moments, saved = forward(spec, x, shortcut, chain.parameters, chain.running, k)
                forward_steps = recorder.take()
                needs_grad = [t is not None and t.requires_grad for t in (x, shortcut, *chain.parameters)]
                if any(needs_grad):
                    masking = output if spec.masks_by_output else None
                    grad = torch.empty_like(output)
                    backward(spec, grad, x, shortcut, masking, chain.parameters, moments, saved, needs_grad, k)
            kept = sum(map(_bytes, (output, *saved)))
            self.steps.append((self.index, Steps(forward_steps, recorder.take(), kept)))
        return output.requires_grad_(any(needs_grad))


class Recorder(TorchDispatchMode):
    """Notes every kernel that runs inside; what only makes views or allocates is none.

    Parameters
    ----------
    parameters
        Tensors of four dimensions are activations, unless they have the shape of a parameter or are 1×1.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {p.shape for p in parameters}
        self._steps: list[Step] = []
        self._paused = False

    def take(self) -> tuple[Step, ...]:
        """Return what was noted since the last time."""
        steps, self._steps = tuple(self._steps), []
        return steps

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Note nothing inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def note(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], flop: int = 0) -> None:
        """Note one kernel."""
        moved = sum(map(_bytes, (*reads, *writes)))
        self._steps.append(Step(name, self._activations(reads), self._activations(writes), moved, flop))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition(".")[0].partition("::")
        if self._paused or namespace not in ("aten", "fused_resnet"):
            return results
        if func is torch.ops.aten.convolution_backward.default:
            grad, x, weight = args[:3]
            for direction, operand, result in zip(("dgrad", "wgrad"), (weight, x), results, strict=False):
                if result is not None:
                    self.note(f"convolution {direction}", (grad, operand), (result,), _product(grad, weight))
        elif func is torch.ops.aten.convolution.default:
            self.note("convolution", list(_tensors(args)), (results,), _product(results, args[1]))
        elif not func.is_view and name not in ALLOCATIONS:
            in_place = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            written = [
                t for value, is_written in zip(args, in_place, strict=False) if is_written for t in _tensors(value)
            ]
            fresh = [t for t in _tensors(results) if not any(t is w for w in written)]
            flop = 2 * args[1].numel() * args[2].shape[1] if name == "addmm_" else 0
            self.note(name, list(_tensors(args)), (*written, *fresh), flop)
        return results

    def _activations(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        images = [t for t in map(_whole, tensors) if t.dim() > 2 and t.shape[2:].numel() > 1]
        return tuple(tuple(t.shape) for t in images if t.shape not in self._weights)


def _whole(tensor: Tensor) -> Tensor:
    """Return the activation that a matrix of its pixels is a view of."""
    base = tensor._base
    return base if base is not None and base.numel() == tensor.numel() else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an argument or a result, which may be lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _product(output: Tensor, weight: Tensor) -> int:
    """Return the FLOP of a convolution in one direction."""
    return 2 * output.numel() * weight[0].numel()


def _noted(k: SimpleNamespace, recorder: Recorder) -> SimpleNamespace:
    """Return an engine's operations so that those which the dispatcher does not know are noted, too.

    Those are Triton's 1×1 convolutions: their kernels, and not what stands in for their results here.
    """
    if k.engine != "triton":
        return k

    def pointwise_conv_stats(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        with recorder.pause():
            y, moments, affine = k.pointwise_conv_stats(x, weight, *others)
        recorder.note("fprop, statistics", (x, weight), (y,), _product(y, weight))
        return y, moments, affine

    def pointwise_conv_add_grad_(
        d_source: Tensor, dy: Tensor, weight: Tensor, x: Tensor, wants_weight: bool
    ) -> tuple[Tensor, Tensor]:
        with recorder.pause():
            sums, d_weight = k.pointwise_conv_add_grad_(d_source, dy, weight, x, wants_weight)
        name = "dgrad, wgrad, add, mask" if wants_weight else "dgrad, add, mask"
        flop = (1 + wants_weight) * _product(dy, weight)
        recorder.note(name, (d_source, dy, weight, x), (d_source, d_weight), flop)
        return sums, d_weight

    def note_gram(x: Tensor) -> None:
        recorder.note("Gram matrix", (x,), (), 2 * x.numel() * x.shape[1])

    def pointwise_conv_norm_act(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, _, weight, _, _, _, residual, *_ = others
        with recorder.pause():
            z, moments, affine, gram = k.pointwise_conv_norm_act(x, *others)
        note_gram(x)
        recorder.note("fprop act", [t for t in (x, weight, residual) if t is not None], (z,), _product(z, weight))
        return z, moments, affine, gram

    def pointwise_conv_norm_backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, x, _, _, _, weight, _, gram, *_, wants_input = others
        with recorder.pause():
            du, d_weight, grad_weight, sums = k.pointwise_conv_norm_backward(grad, *others)
        if not gram.numel():
            note_gram(x)
        flop = _product(grad, weight)
        recorder.note("wgrad", (grad, x), (d_weight,), flop)
        if wants_input:
            recorder.note("dgrad", (grad, x, weight), (du,), flop + 2 * x.numel() * x.shape[1])
        return du, d_weight, grad_weight, sums

    own = (
        pointwise_conv_stats,
        pointwise_conv_add_grad_,
        pointwise_conv_norm_act,
        pointwise_conv_norm_backward,
    )
    return SimpleNamespace(**{**vars(k), **{function.__name__: function for function in own}})
