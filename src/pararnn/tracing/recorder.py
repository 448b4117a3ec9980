"""Record the aten operations of a function, each with the line of user code that called it."""

from __future__ import annotations

import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pararnn._notebook import name_of
from pararnn.tracing.ran import LIBRARY, unnoted

aten = torch.ops.aten
_ABOVE_TORCH = str(Path(torch.__file__).parents[1]) + os.sep
_MODULES = str(Path(torch.nn.__file__).parent)


class TraceError(ValueError):
    """The cell has no parallel form; the message says why, where, and what to do instead."""


class NeedsFunctionalization(Exception):
    """A tensor is used after a write through another view of it; functionalize the function first.

    Attributes:
        write: The operation that wrote, and its file and line.
    """

    def __init__(self, write: str) -> None:
        super().__init__(write)
        self.write = write


class Recorder(TorchDispatchMode):
    """Runs operations as PyTorch dispatches them and records them in an `fx.Graph`.

    Args:
        inputs: Tensors that become placeholders, by name.
        subject: What error messages call the function.
        focus: Code object of the user's function. `meta["line"]` of a node is the line that it was
            at, even when a callee ran the operation; `meta["variable"]` is its local variable that
            holds the value, if one does.
        labels: What messages call the inputs; their names when None.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        subject: str,
        focus: CodeType | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.focus = focus
        self.labels = labels or {}
        self.graph = fx.Graph()
        self.subject = subject
        self.constants: list[Tensor] = []
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._outdated: set[int] = set()
        self._latest_write = ""
        self._saved: list[Tensor] = []
        self._unpacked: Tensor | None = None
        self._ordinary: set[CodeType] = set()  # code that is not of an autograd function
        self._inputs = {_storage(tensor): name for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._bind(tensor, self.graph.placeholder(name))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # if True, PyTorch imports its compiler, which takes 2 s

    def __enter__(self) -> Recorder:
        self._grad = torch.is_grad_enabled()
        return super().__enter__()

    def pack(self, tensor: Tensor) -> int:
        """Keep a tensor for autograd, which would keep it in a reference cycle that never ends."""
        self._saved.append(tensor)
        return len(self._saved) - 1

    def unpack(self, number: int) -> Tensor:
        """Give autograd a saved tensor, and note it: autograd detaches it next (see `_same`)."""
        saved = self._saved[number]
        self._unpacked = _inside(saved)
        return saved

    def values(self) -> dict[fx.Node, Tensor]:
        """The recorded tensors by node; a tensor written in place is at its latest node."""
        return {self._nodes[id(tensor)]: tensor for tensor in self._alive}

    def forget(self) -> None:
        """Drop all tensors: autograd keeps this recorder alive through its hooks."""
        self._saved.clear()
        self._nodes.clear()
        self._alive.clear()
        self.constants = []

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made `tensor`; a tensor from outside becomes a constant."""
        if id(tensor) in self._outdated:
            raise NeedsFunctionalization(self._latest_write)
        if id(tensor) not in self._nodes:
            node = self.graph.create_node("get_attr", f"constant_{len(self.constants)}")
            self.constants.append(tensor)
            self._bind(tensor, node)
        return self._nodes[id(tensor)]

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    @unnoted
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        unpacked, self._unpacked = self._unpacked, None
        if func is aten.detach.default and unpacked is not None and args[0] is unpacked:
            return self._same(unpacked)
        place, line, frame = _find_frames(self.focus)
        self._note_variables(frame)
        self._refuse(func, args, place)
        pure = self._without_write(func, args, place) if func._schema.is_mutable else func
        to_node = lambda a: self.node_of(a) if isinstance(a, Tensor) else a  # noqa: E731
        result = func(*args, **kwargs)
        origin = {"place": place, "line": line}
        if pure is aten.copy.default:  # aten.copy has no derivative; expand and _to_copy have
            source = self._cast(args[1], result.dtype, origin)
            pure, args, kwargs = aten.expand.default, (source, list(result.shape)), {}
        elif pure is aten.empty_like.default:  # depends on the shape alone
            kinds = {"dtype": result.dtype, "device": result.device}
            pure, args, kwargs = aten.empty.memory_format, (list(result.shape),), kinds
        elif pure is aten.index_put.default and _fills_a_mask(*args):
            # `h[mask] = number`: the gradient of the number would pick entries by the mask
            mask = self._unsqueezed(args[1][0], args[0].dim(), origin)
            pure, args, kwargs = aten.where.self, (mask, args[2], args[0]), {}
        given = map_aggregate(args, to_node), map_aggregate(kwargs, to_node)
        node = self.graph.call_function(pure, *given)
        node.meta.update(origin)
        if isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, i))
                    part.meta.update(origin)
                    self._bind(item, part)
        elif isinstance(result, Tensor):
            if self._grad and not torch.is_grad_enabled() and is_differentiable(result.dtype):
                keeps = func._schema.is_mutable and args[0].requires_grad
                old = self.node_of(args[0]) if keeps else None
                self._bind(result, node)
                node = self._without_history(node, old)
            self._bind(result, node)
        return result

    def _without_history(self, new: fx.Node, old: fx.Node | None) -> fx.Node:
        """The value of `new` detached; its gradient goes to `old`, which it overwrote, if any."""

        def call(func: Any, *args: fx.Node) -> fx.Node:
            node = self.graph.call_function(func, args)
            node.meta.update(new.meta)
            return node

        value = call(aten.detach.default, new)
        if old is None:
            return value
        nothing = call(aten.sub.Tensor, old, call(aten.detach.default, old))
        return call(aten.add.Tensor, value, nothing)

    def _note_variables(self, frame: FrameType | None) -> None:
        for name, value in () if frame is None else frame.f_locals.items():
            if isinstance(value, Tensor) and id(value) in self._nodes:
                self._nodes[id(value)].meta.setdefault("variable", name)

    def _same(self, unpacked: Tensor) -> Tensor:
        """Detach a saved tensor for autograd; the alias keeps its node, so its history is kept."""
        alias = unpacked.detach()
        node = self.node_of(unpacked)
        self._nodes[id(alias)] = node
        self._alive.append(alias)
        return alias

    def _cast(self, tensor: Tensor, dtype: torch.dtype, origin: dict[str, Any]) -> fx.Node:
        node = self.node_of(tensor)
        if tensor.dtype is dtype:
            return node
        cast = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        cast.meta.update(origin, shape=tuple(tensor.shape), dtype=dtype)
        return cast

    def _unsqueezed(self, tensor: Tensor, dims: int, origin: dict[str, Any]) -> fx.Node:
        node, shape = self.node_of(tensor), tuple(tensor.shape)
        while len(shape) < dims:
            node, shape = self.graph.call_function(aten.unsqueeze.default, (node, -1)), (*shape, 1)
            node.meta.update(origin, shape=shape, dtype=tensor.dtype)
        return node

    def _without_write(self, func: Any, args: Any, place: tuple[str, int] | None) -> Any:
        """The functional form of `func`, which writes in place; marks other views as outdated.

        Raises:
            NeedsFunctionalization: No functional form has the same arguments.
            TraceError: It writes into an input.
        """
        packet = func._schema.name.removeprefix("aten::")
        pure = _same_call(getattr(aten, packet.removesuffix("_"), None), func)
        self._latest_write = f"the operation {packet} at {show_place(place)}"
        if pure is None or not packet.endswith("_"):
            raise NeedsFunctionalization(self._latest_write)
        written = args[0]
        if _storage(written) in self._inputs:
            raise TraceError(
                f"{self.subject} writes into {self._called(written)} in place at "
                f"{show_place(place)}; compute a new tensor instead (all times are evaluated at "
                "once, so there is no order for such writes)."
            )
        others = (t for t in self._alive if t is not written and _overlap(t, written))
        self._outdated.update(map(id, others))
        return pure

    def _called(self, tensor: Tensor) -> str:
        name = self._inputs[_storage(tensor)]
        return self.labels.get(name, repr(name))

    def _refuse(self, func: Any, args: Any, place: tuple[str, int] | None) -> None:
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            raise TraceError(
                f"{self.subject} reads the value of a tensor at {show_place(place)} (an `if`, "
                "`while`, `.item()` or `float()` on it), so its operations depend on the data; "
                "use torch.where for a choice by element."
            )
        if func is aten.index.Tensor and any(
            i.dtype is torch.bool for i in args[1] if i is not None
        ):
            raise TraceError(
                f"{self.subject} picks entries by a mask at {show_place(place)}, so their number "
                "depends on the data; use torch.where, or an index of integers."
            )
        if func.namespace == "quantized":
            raise TraceError(
                f"{self.subject} calls {func} at {show_place(place)}, a quantised operation with "
                "packed weights, which cannot be traced. Keep the weights as integers in a buffer "
                "and multiply by (integers * scale) in the step, or quantise other layers only."
            )
        if self._grad and not torch.is_grad_enabled() and self._inside_autograd_function():
            raise TraceError(
                f"{self.subject} calls a torch.autograd.Function at {show_place(place)}; its "
                "backward cannot be seen by tracing. Write it with ordinary operations and "
                ".detach()."
            )

    def _inside_autograd_function(self) -> bool:
        """Whether a `torch.autograd.Function` runs inside the recorded function.

        Looks for a frame of its `forward`: from PyTorch 2.14 on, `apply` has none. Frames outside
        the recorded function do not count; reentrant checkpointing may be there.
        """
        running = set()
        frame: FrameType | None = sys._getframe(3)
        while frame is not None and frame.f_code is not _run.__code__:
            running.add(frame.f_code)
            frame = frame.f_back
        unknown = running - self._ordinary
        if unknown and not unknown.isdisjoint(_forwards()):
            return True
        self._ordinary |= unknown
        return False


def mapped(
    node: fx.Node, function: Callable[[fx.Node], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with `function` applied to every node among them."""
    found: Any = fx.map_arg((node.args, node.kwargs), function)
    args, kwargs = found
    return args, kwargs


def _fills_a_mask(
    tensor: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> bool:
    """Whether `index_put` writes one number wherever a mask of the leading axes holds."""
    mask = indices[0]
    is_mask = mask is not None and mask.dtype is torch.bool and len(indices) == 1
    return is_mask and values.dim() == 0 and not accumulate


def _same_call(packet: Any, func: Any) -> Any:
    """The overload with the arguments of `func`: pow.Tensor_Scalar for pow_.Scalar."""
    kinds = lambda f: [(str(a.type), a.default_value) for a in f._schema.arguments]  # noqa: E731
    overloads = [] if packet is None else [getattr(packet, o) for o in packet.overloads()]
    return next((o for o in overloads if kinds(o) == kinds(func)), None)


def _find_frames(
    focus: CodeType | None,
) -> tuple[tuple[str, int] | None, int, FrameType | None]:
    """Find the user's code on the stack.

    Returns:
        The innermost file and line outside PyTorch and this package; then the current line of
        `focus` (0 if it is not running) and its frame. If `focus` itself is code of PyTorch or this
        package, the place is inside it: for `torch.nn`, the innermost line there.
    """
    place, inside, line = None, None, 0
    frame = sys._getframe(1).f_back  # None in a thread of autograd
    while frame is not None and frame.f_code is not _run.__code__:
        filename = frame.f_code.co_filename
        if place is None and not filename.startswith(LIBRARY):
            place = filename, frame.f_lineno
        if inside is None and filename.startswith(_MODULES):
            inside = filename, frame.f_lineno
        if frame.f_code is focus:
            line = frame.f_lineno
            place = place or (inside if filename.startswith(_MODULES) else (filename, line))
            break
        frame = frame.f_back
    return place, line, frame


def is_differentiable(dtype: torch.dtype) -> bool:
    """Whether autograd differentiates tensors of a type."""
    return dtype.is_floating_point or dtype.is_complex


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share an element."""
    if _storage(a) != _storage(b):
        return False
    size = max(t.untyped_storage().nbytes() // t.element_size() for t in (a, b))
    marks = torch.zeros(size, dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _forwards() -> set[CodeType | None]:
    """The code of every autograd function's forward."""
    found, classes = set(), [torch.autograd.Function]
    while classes:
        function = classes.pop()
        found.add(getattr(function.forward, "__code__", None))
        classes += function.__subclasses__()
    return found


def show_place(place: tuple[str, int] | None) -> str:
    """A file and line as an error message shows them; unknown where code is generated.

    PyTorch's files are shown as they are called within it.
    """
    if place is None or is_generated(place):
        return "an unknown line"
    return f"{name_of(place[0]).removeprefix(_ABOVE_TORCH)}:{place[1]}"


def is_generated(place: tuple[str, int] | None) -> bool:
    """Whether a place is in code that FX generated, which is in no file."""
    return place is not None and place[0].startswith("<eval_with_key>")


Look = Callable[[fx.Graph, list[Tensor], dict[fx.Node, Tensor]], None]
"""Called with a graph, its constants, and the tensor of each node."""


def record(
    function: Callable[..., Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    subject: str,
    focus: CodeType | None = None,
    labels: Mapping[str, str] | None = None,
    look: Look | None = None,
) -> tuple[fx.Graph, list[Tensor]]:
    """Run `function(*inputs)` and record its operations.

    A function that writes into tensors through views is functionalized first.

    Args:
        function: What to record.
        inputs: See `Recorder`.
        subject: See `Recorder`.
        focus: See `Recorder`.
        labels: See `Recorder`.
        look: Called after the run, while the recorded tensors still have their autograd history.
            Functionalization, which loses the history, is not tried then.

    Returns:
        The graph, whose output is the tuple of results, and its constants, which the graph names
        `constant_0`, `constant_1` and so on.

    Raises:
        TraceError: An operation has no parallel form.
        NeedsFunctionalization: With `look`, the function writes through a view.
    """
    try:
        return _run(function, inputs, Recorder(inputs, subject, focus, labels), look)
    except NeedsFunctionalization:
        if look is not None:
            raise
        copies = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in inputs.items()
        }
    try:
        recorder = Recorder(copies, subject, focus, labels)
        return _run(_functional(function), copies, recorder)
    except NeedsFunctionalization:
        raise TraceError(
            f"{subject} writes into a tensor in a way that cannot be followed; use operations "
            "that return a new tensor."
        ) from None


def _functional(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """The function under PyTorch's functionalization, which turns writes into new tensors.

    Autograd runs above functionalization, so writes that autograd does itself are turned as well.
    `torch.func.functionalize` would not do that.
    """

    def run(*inputs: Tensor) -> list[Tensor]:
        torch._enable_functionalization(reapply_views=True)
        try:
            wrapped = [torch._to_functional_tensor(tensor) for tensor in inputs]
            for tensor, wrapper in zip(inputs, wrapped, strict=True):
                torch._mirror_autograd_meta_to(tensor, wrapper)  # type: ignore[attr-defined]
            results = [_inside(result) for result in function(*wrapped)]
            current = [_inside(wrapper) for wrapper in wrapped]
        finally:
            torch._disable_functionalization()
        for tensor, now in zip(inputs, current, strict=True):
            if now is not tensor:
                tensor.copy_(now)  # a write into an input, which the recorder refuses
        return results

    return run


def _inside(tensor: Tensor) -> Tensor:
    """The tensor inside a functionalization wrapper, with pending writes; others unchanged."""
    if not torch._is_functional_tensor(tensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor)


def _run(
    function: Callable[..., Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    recorder: Recorder,
    look: Look | None = None,
) -> tuple[fx.Graph, list[Tensor]]:
    # Activation checkpointing around this call would drop the tensors that autograd saves here.
    as_they_are = torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack)
    try:
        with as_they_are, _Replaced(recorder.subject), sdpa_kernel(SDPBackend.MATH), recorder:
            try:
                results = function(*inputs.values())
            except RuntimeError as error:
                _refuse_nested(error, recorder.subject)
                raise
        recorder.graph.output(tuple(recorder.node_of(r) for r in results))
        if look is not None:
            look(recorder.graph, recorder.constants, recorder.values())
        return recorder.graph, recorder.constants
    finally:
        recorder.forget()


class _Replaced(TorchFunctionMode):
    """Replaces functions whose operations depend on the data or have no recordable derivative."""

    def __init__(self, subject: str) -> None:
        super().__init__()
        self.subject = subject

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.one_hot:
            return self.one_hot(*args, **kwargs)
        if func is nn.functional.batch_norm:
            given = dict(zip(_OF_BATCH_NORM, args, strict=False)) | kwargs
            if not given.get("training", False):
                return _batch_norm(**given)
        if func is nn.functional.instance_norm:
            given = dict(zip(_OF_INSTANCE_NORM, args, strict=False)) | kwargs
            from_input = given.pop("use_input_stats", True)
            if not from_input:
                return _batch_norm(**given)
            if given["input"].dim() > 2 and given.get("running_mean") is None:
                return _instance_norm(**given)
        if func is nn.functional.bilinear:
            return _bilinear(*args, **kwargs)
        return func(*args, **kwargs)

    def one_hot(self, tensor: Tensor, num_classes: int = -1) -> Tensor:
        """Look rows up in an identity matrix; PyTorch's `one_hot` reads the values first.

        Raises:
            TraceError: num_classes is missing.
        """
        if num_classes < 0:
            raise TraceError(
                f"{self.subject} calls one_hot without num_classes, so the number of classes "
                "depends on the data; pass num_classes=..."
            )
        rows = torch.eye(num_classes, dtype=torch.int64, device=tensor.device)
        return nn.functional.embedding(tensor, rows)


_OF_BATCH_NORM = "input running_mean running_var weight bias training momentum eps".split()


def _batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation with given statistics; PyTorch's gives them no gradient."""
    along = [-1, *[1] * (input.dim() - 2)]
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = (input - running_mean.view(along)) * scale.view(along)
    return result if bias is None else result + bias.view(along)


_OF_INSTANCE_NORM = (
    "input running_mean running_var weight bias use_input_stats momentum eps".split()
)


def _instance_norm(
    input: Tensor,
    running_mean: None = None,
    running_var: None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of each row; PyTorch's reshapes rows into channels to do it."""
    result = nn.functional.layer_norm(input, input.shape[2:], eps=eps)
    along = [-1, *[1] * (input.dim() - 2)]
    result = result if weight is None else result * weight.view(along)
    return result if bias is None else result + bias.view(along)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bilinear` from several operations: with PyTorch's single one, rows may seem to mix."""
    product = torch.einsum("...i,oij->...oj", input1, weight)
    result = (product * input2.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


def _refuse_nested(error: RuntimeError, subject: str) -> None:
    """Explain PyTorch's error for `torch.func` derivatives inside the recorded function.

    Raises:
        TraceError: `error` is about saved tensor hooks.
    """
    frames = traceback.extract_tb(error.__traceback__)
    python = Path(traceback.__file__).parent  # contextlib and others are between PyTorch's frames
    outside = [
        f
        for f in frames
        if not f.filename.startswith(LIBRARY) and Path(f.filename).parent != python
    ]
    place = show_place((outside[-1].filename, outside[-1].lineno or 0) if outside else None)
    if "saved tensor hooks" in str(error):
        raise TraceError(
            f"{subject} calls torch.func.grad, vjp, jacrev or hessian at {place}, which cannot be "
            "traced; use torch.autograd.grad(..., create_graph=True) or torch.func.jvp."
        ) from error
