"""Record everything that a trace depends on, and check quickly whether it has changed.

A trace is valid while everything that the step's Python code read is unchanged. `_Look` follows all
that can be reached from the step: attributes, containers, hooks, classes, globals, closures. Of an
object it follows only attributes that the code that ran names. The quick check runs at every call;
it compares the contents of containers by identity. If it finds a difference, a new `_Look` compares
by value, so another tuple of equal numbers does not count as a change.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pararnn.tracing.modes import HOOKS_OF_ALL, is_a_tools
from pararnn.tracing.ran import Ran, has_users_code

_MODULE_OWN = frozenset(vars(nn.Module())) - {"training"}
_STORES = ("_parameters", "_buffers")
_HOOKS = tuple(n for n in _MODULE_OWN if "hooks" in n and "state_dict" not in n)
_PLAIN = (type(None), bool, int, str, bytes, range, type(...), torch.dtype, torch.device)
_NUMBERS = (float, complex)
_SILENT = frozenset(("__dict__", "__weakref__", "__doc__", "__annotations__", "__module__"))
_MOST = 2000  # objects to inspect; all others are compared by identity
_OFTEN = 8  # changes of one value before a warning
_OF_CELLS = ("forward", "readout", "hidden_size", "num_components", "state_shape")
_NOTHING = object()


class Same:
    """Wraps an object, to compare it by identity."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Change(NamedTuple):
    """A changed value, with its place ("self.options['leak']")."""

    place: str
    old: object
    new: object


class Watched:
    """Everything that a trace depends on.

    Args:
        step: The traced cell or function.
        ran: The Python code that ran in the trace.
        tensors_of: Gives the tensors of a step that the trace reads again at every call, by name.
    """

    def __init__(
        self, step: Any, ran: Ran, tensors_of: Callable[[Any], Mapping[str, Tensor]]
    ) -> None:
        self.step, self.ran, self.tensors_of = step, ran, tensors_of
        self._look = _Look(step, ran, tensors_of(step))

    @property
    def tied(self) -> bool:
        """Whether the step also reads one of these tensors from another place."""
        return self._look.quick.tied

    def is_current(self, step: Any) -> bool:
        """Whether all values are identical; quick, and False if in doubt."""
        return step is self.step and self._look.quick.is_current()

    def change(self, step: Any) -> Change | None:
        """The first value that has changed since the step was traced, or None."""
        if step is not self.step:
            return Change("the cell", self.step, step)
        old, look = self._look.facts, _Look(step, self.ran, self.tensors_of(step))
        if look.facts == old:
            self._look = look
            return None
        new = look.facts
        place = next(p for p in (*new, *old) if new.get(p, _NOTHING) != old.get(p, _NOTHING))
        return Change(place, old.get(place), new.get(place))


class Annealed:
    """Warns of values that change again and again, each time with a new trace."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def note(self, subject: str, change: Change) -> None:
        """Count a change; warn at the eighth of one value. `training` does not count."""
        _, _, name = change.place.rpartition(".")
        if name == "training":
            return
        self._times[change.place] += 1
        if self._times[change.place] == _OFTEN:
            advice = (
                f"Keep it as a tensor that changes in place: self.register_buffer({name!r}, "
                f"torch.tensor(...)), then self.{name}.fill_(...)."
                if name.isidentifier() and all(map(_is_number, (change.old, change.new)))
                else "Tensors that change in place, such as buffers, need no new trace. Keep "
                "values that hooks only record in a container that nothing else writes into."
            )
            warnings.warn(
                f"{subject} has been traced again {_OFTEN} times because {change.place} changed; "
                f"each time kernels may be compiled again. {advice}",
                stacklevel=2,
            )


class _Look:
    """One inspection of everything that can be reached from the step.

    Attributes:
        facts: Values to compare, by place.
        quick: Containers and their contents, to compare by identity.
    """

    def __init__(self, step: Any, ran: Ran, tensors: Mapping[str, Tensor]) -> None:
        self.ran = ran
        self.facts: dict[str, object] = {}
        self.quick = _Quick()
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._with_grad = ran.reads("requires_grad")
        self._seen: dict[int, str] = {}
        self._queue: deque[tuple[str, Any]] = deque()
        self._alive = [step, tensors]  # keeps the ids in `_seen` valid
        self.value("self" if isinstance(step, nn.Module) else "step", step)
        for name, hooks in HOOKS_OF_ALL.items():
            self.hooks(name, hooks, [h for h in hooks.values() if not is_a_tools(h)])
        for module, names in ran.globals():
            self.named(str(module.get("__name__")), module, names, whole=False)
        while self._queue:
            self.look_into(*self._queue.popleft())
        self.quick.hold()
        del self._names, self._seen, self._alive  # `facts` and `quick` keep what they need

    def fact(self, place: str, value: object) -> None:
        while place in self.facts:  # two classes have the same name
            place += "'"
        self.facts[place] = value

    def value(self, place: str, value: Any) -> None:
        """Note a value; containers and objects are queued, so near ones are inspected first."""
        if type(value) in _PLAIN:
            self.fact(place, (type(value), value))
        elif isinstance(value, _NUMBERS):
            self.fact(place, (type(value), repr(value)))  # -0.0 is not 0.0, and NaN is NaN
        elif isinstance(value, Tensor):
            self.tensor(place, value)
        elif id(value) in self._seen:
            self.fact(place, ("the same as", self._seen[id(value)]))
        elif len(self._seen) < _MOST:
            self.see(place, value)
            self._queue.append((place, value))
        else:
            self.fact(place, Same(value))

    def see(self, place: str, value: Any) -> bool:
        """Note an object as seen; True if it is new."""
        new = id(value) not in self._seen
        if new:
            self._seen[id(value)] = place
            self._alive.append(value)
        return new

    def look_into(self, place: str, value: Any) -> None:
        if isinstance(value, type):
            self.class_of(place, value)
            return
        looks = (look for kinds, look in _LOOKS if isinstance(value, kinds))
        next(looks, _Look.other)(self, place, value)

    def tensor(self, place: str, tensor: Tensor) -> None:
        """Note a tensor by its name, or by identity if it is a constant of the trace."""
        name = self._names.get(id(tensor))
        kind = (tensor.shape, tensor.dtype, self._with_grad and tensor.requires_grad)
        self.fact(place, (name or Same(tensor), kind))
        self.quick.tied |= name is not None and place != f"self.{name}"

    def module(self, place: str, module: nn.Module) -> None:
        """A module's class, hooks, stores and attributes."""
        own = vars(module)
        for name in _HOOKS:
            if isinstance(own.get(name), dict):
                self.hooks(f"{place}.{name}", own[name])
        for name in _STORES:
            self.tensors(place, own[name])
        for name, part in self.quick.dictionary(own["_modules"], is_named=True).items():
            self.value(f"{place}.{name}", part)
        changing = getattr(type(module), "changes_by_itself", ())  # of a layer of this package
        known = [n for n in own if n not in _MODULE_OWN and n not in changing]
        if not _is_pytorchs(type(module)):
            known = [n for n in known if n in _OF_CELLS or self.ran.reads(n)]
        elif not (self.ran.reads("training") or _asks_for_mode(type(module))):
            known = [n for n in known if n != "training"]
        self.named(place, own, known)
        self.quick.read(own, [n for n in own if n in _HOOKS or n in (*_STORES, "_modules")])
        self.type_of(place, module)

    def tensors(self, place: str, store: dict[str, Tensor | None]) -> None:
        """Parameters or buffers; a tensor that the trace reads at every call may be replaced."""
        constant = [n for n, t in store.items() if t is not None and id(t) not in self._names]
        self.quick.tensors(store, self._with_grad)
        self.quick.read(store, constant)
        for name, tensor in store.items():
            self.value(f"{place}.{name}", tensor)

    def hooks(self, place: str, hooks: dict[int, Any], which: list[Any] | None = None) -> None:
        """All hooks, or those of `which`, in their order; their numeric keys do not matter."""
        values = list(self.quick.dictionary(hooks).values())
        for number, hook in enumerate(values if which is None else which):
            self.value(f"{place}[{number}]", hook)

    def dictionary(self, place: str, values: Mapping[Any, Any]) -> None:
        is_named = all(type(key) is str for key in values)
        self.fact(place, (type(values), tuple(values) if is_named else len(values)))
        self.quick.dictionary(values, is_named)
        for number, (key, value) in enumerate(values.items()):
            if is_named:
                self.value(f"{place}[{key!r}]", value)
            else:
                self.value(f"key {number} of {place}", key)
                self.value(f"{place}[{number}]", value)
        self.attributes(place, values)

    def sequence(self, place: str, values: Any) -> None:
        self.fact(place, (type(values), len(values)))
        self.quick.sequence(values)
        for number, value in enumerate(values):
            self.value(f"{place}[{number}]", value)
        self.attributes(place, values)

    def function(self, place: str, function: types.FunctionType) -> None:
        """A function by its code and, if the code ran, by its defaults, closure and attributes."""
        code = function.__code__
        self.fact(place, Same(code))
        if id(code) not in self.ran.codes:
            return
        self.quick.readers.append((_OF_FUNCTION, function))
        self.value(f"{place}.__defaults__", function.__defaults__)
        self.value(f"{place}.__kwdefaults__", function.__kwdefaults__)
        cells = function.__closure__ or ()
        self.quick.readers.append((_contents, cells))
        for name, content in zip(code.co_freevars, _contents(cells), strict=True):
            self.value(f"{place}.{name}", content)
        self.attributes(place, function)

    def method(self, place: str, method: types.MethodType) -> None:
        self.value(f"{place}.__func__", method.__func__)
        self.value(f"{place}.__self__", method.__self__)

    def partial(self, place: str, partial: functools.partial[Any]) -> None:
        self.fact(place, type(partial))
        self.value(f"{place}.func", partial.func)
        self.value(f"{place}.args", partial.args)
        self.value(f"{place}.keywords", partial.keywords)
        self.attributes(place, partial)

    def python_module(self, place: str, module: types.ModuleType) -> None:
        self.fact(place, Same(module))
        if has_users_code(module):
            inside = vars(module)
            self.named(place, inside, [n for n in inside if n in self.ran.names], whole=False)

    def reference(self, place: str, reference: weakref.ReferenceType[Any]) -> None:
        self.value(f"{place}()", reference())

    def constant(self, place: str, value: object) -> None:
        self.fact(place, Same(value))

    def text_or_number(self, place: str, value: Any) -> None:
        """A value of a subclass of `int`, `str` or `bytes`."""
        base = next(b for b in (int, str, bytes) if isinstance(value, b))
        self.fact(place, (type(value), base.__repr__(value)))
        self.attributes(place, value)

    def other(self, place: str, value: Any) -> None:
        """An array by its content, an object by its attributes, anything else by identity."""
        content = _content(value)
        if content is not None:
            kind = getattr(value, "shape", None), str(getattr(value, "dtype", None))
            self.fact(place, (type(value), kind, content))
            self.quick.contents.append((value, content))
        elif isinstance(getattr(value, "__dict__", None), dict) or _slots(type(value)):
            self.fact(place, type(value) if has_users_code(type(value)) else Same(value))
            self.attributes(place, value)
            self.type_of(place, value)
        else:
            self.fact(place, Same(value))

    def attributes(self, place: str, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and self.see(f"{place}.__dict__", own):
            self.named(place, own, [n for n in own if self.ran.reads(n)])
        slots = [n for n in _slots(type(value)) if self.ran.reads(n)]
        if slots:
            read = functools.partial(_of_slots, slots)
            self.quick.readers.append((read, value))
            for name, held in zip(slots, read(value), strict=True):
                self.value(f"{place}.{name}", held)

    def type_of(self, place: str, value: Any) -> None:
        self.quick.objects.append(value)
        self.class_of(f"type({place})", type(value))

    def class_of(self, place: str, kind: type) -> None:
        """A class, and what the user's classes among its bases define."""
        self.fact(place, Same(kind))
        for base in kind.__mro__:
            if has_users_code(base) and self.see(base.__name__, vars(base)):
                own = [n for n in vars(base) if self.reads_of_class(n)]
                self.named(base.__name__, vars(base), own)

    def reads_of_class(self, name: str) -> bool:
        """Whether the code may have read this name from a class; operators read it unnamed."""
        by_operator = name in _OF_CELLS or (name[:2] == "__" and name not in _SILENT)
        return by_operator or self.ran.reads(name)

    def named(
        self, place: str, values: Mapping[str, Any], names: list[str], whole: bool = True
    ) -> None:
        """Some values of a namespace; with `whole`, a new name in it counts as a change."""
        if whole:
            self.quick.names(values)
        self.quick.read(values, names)
        for name in names:
            self.value(f"{place}.{name}", _function_of(values[name]))


class _Quick:
    """The contents of containers, compared by identity.

    The methods add containers; `hold` then reads all contents, and `is_current` compares them.
    """

    def __init__(self) -> None:
        self.objects: list[object] = []
        self.readers: list[tuple[Callable[[Any], Iterable[object]], Any]] = []
        self.contents: list[tuple[Any, bytes]] = []
        self.tied = False  # whether a tensor of the step is also read from another place
        self._empty: list[Any] = []
        self._sized: list[Any] = []
        self._named: list[Mapping[str, Any]] = []
        self._stores: list[Iterable[Tensor | None]] = []  # dict views, always up to date
        self._kind: Callable[[Any], object] = _KIND

    def read(self, values: Mapping[str, Any], names: list[str]) -> None:
        if names:
            self.readers.append((operator.itemgetter(names[0], *names), values))

    def names(self, values: Mapping[str, Any]) -> None:
        self._named.append(values)
        self._sized.append(values)

    def dictionary(self, values: Mapping[Any, Any], is_named: bool = False) -> Mapping[Any, Any]:
        if not values:
            self._empty.append(values)
        elif is_named:
            self.names(values)
            self.readers.append((_values, values))
        else:
            self._sized.append(values)
            self.readers.append((_items, values))
        return values

    def sequence(self, values: Any) -> None:
        if not values:
            self._empty.append(values)
        elif not isinstance(values, (tuple, frozenset)):
            self._sized.append(values)
            self.readers.append((iter, values))

    def tensors(self, store: dict[str, Tensor | None], with_grad: bool) -> None:
        self._kind = _KIND_WITH_GRAD if with_grad else _KIND
        if store:
            self.names(store)
            self._stores.append(store.values())
        else:
            self._empty.append(store)

    def hold(self) -> None:
        self._lengths = list(map(len, self._sized))
        self._keys = list(chain.from_iterable(self._named))
        self._values = list(chain.from_iterable([read(values) for read, values in self.readers]))
        self._types = list(map(type, self.objects))
        self._tensors = list(chain.from_iterable(self._stores))
        self._kinds = [t if t is None else self._kind(t) for t in self._tensors]

    def is_current(self) -> bool:
        """Whether nothing has changed; tensors may be replaced by others of the same kinds.

        Every call of a layer runs this, so it is one function.
        """
        try:
            if (
                any(self._empty)
                or list(map(len, self._sized)) != self._lengths
                or list(chain.from_iterable(self._named)) != self._keys
                or list(map(type, self.objects)) != self._types
            ):
                return False
            now = chain.from_iterable([read(values) for read, values in self.readers])
            if not all(map(operator.is_, now, self._values)):
                return False
            tensors, kind = list(chain.from_iterable(self._stores)), self._kind
            if [t if t is None else kind(t) for t in tensors] != self._kinds:
                return False
            if not (all(map(operator.is_, tensors, self._tensors)) or self._may_be_others(tensors)):
                return False
            return not self.contents or all(_content(v) == c for v, c in self.contents)
        except (KeyError, RuntimeError):  # a name is gone, or a container changes while it is read
            return False

    def _may_be_others(self, tensors: list[Tensor | None]) -> bool:
        """Whether tensors may be replaced: as many as before, all distinct, and none tied."""
        each = [t for t in tensors if t is not None]
        before = sum(t is not None for t in self._tensors)
        return not self.tied and len(set(map(id, each))) == len(each) == before


_KIND = operator.attrgetter("shape", "dtype")
_KIND_WITH_GRAD = operator.attrgetter("shape", "dtype", "requires_grad")
_OF_FUNCTION = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_LOOKS: list[tuple[Any, Callable[[_Look, str, Any], None]]] = [
    (nn.Module, _Look.module),
    ((dict, types.MappingProxyType), _Look.dictionary),
    ((tuple, list, deque, set, frozenset), _Look.sequence),
    (types.FunctionType, _Look.function),
    (types.MethodType, _Look.method),
    (functools.partial, _Look.partial),
    (types.ModuleType, _Look.python_module),
    (weakref.ReferenceType, _Look.reference),
    (enum.Enum, _Look.constant),
    ((int, str, bytes), _Look.text_or_number),
]


def _is_number(fact: object) -> bool:
    return isinstance(fact, tuple) and fact[0] in (int, float)


def _values(values: Mapping[Any, Any]) -> Iterable[object]:
    return values.values()


def _items(values: Mapping[Any, Any]) -> Iterable[object]:
    return chain(values, values.values())


def _contents(cells: tuple[types.CellType, ...]) -> list[object]:
    return [_content_of(cell) for cell in cells]


def _content_of(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return _NOTHING


def _of_slots(names: list[str], value: object) -> list[object]:
    return [getattr(value, name, _NOTHING) for name in names]


def _slots(kind: type) -> tuple[str, ...]:
    """The names in `__slots__` of a class and its bases."""
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    names = chain.from_iterable((s,) if isinstance(s, str) else s for s in found)
    return tuple(n for n in names if n not in _SILENT)


def _content(value: Any) -> bytes | None:
    """The bytes of an array; None if the value is no array."""
    try:
        return memoryview(value).tobytes()
    except (TypeError, ValueError, BufferError):
        return None


def _is_pytorchs(kind: type) -> bool:
    """Whether a module class has code of PyTorch or this package, which may read any attribute."""
    bases = (b for b in kind.__mro__ if b is not nn.Module and issubclass(b, nn.Module))
    return not all(map(has_users_code, bases))


def _asks_for_mode(kind: type) -> bool:
    """Whether methods of a module class name the attribute `training`."""
    methods = chain.from_iterable(vars(b).values() for b in kind.__mro__ if b is not nn.Module)
    codes = (m.__code__ for m in methods if isinstance(m, types.FunctionType))
    return any("training" in code.co_names for code in codes)


def _function_of(value: Any) -> Any:
    """The function inside a property, class method or static method; other values unchanged."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
