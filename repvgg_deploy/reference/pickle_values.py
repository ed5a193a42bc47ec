"""What a pickle may become here: plain data, tensors, and inert objects for everything else.

A short list of callables is evaluated by our own arithmetic, because torch and NumPy write tensors as calls of them. Every other callable,
however harmless it looks, becomes a `ForeignObject` that only remembers its name and arguments. Nothing is imported.
Source: torch/_utils.py and torch/storage.py (https://github.com/pytorch/pytorch), numpy/_core/src/multiarray/methods.c (`__reduce__`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .lazy_tensor import LazyTensor, MalformedError, Storage, array_tensor, as_count, as_shape

_DTYPE_CODE = re.compile(r"[fiubc](1|2|4|8|16)\Z")
_MAX_PAIRS = 1_000_000
_REACHING = """
asyncio bdb builtins code codeop commands ctypes distutils ensurepip fileinput ftplib functools glob http imp importlib io linecache marshal
multiprocessing nt operator os pathlib pdb pickle pip pkgutil platform posix posixpath profile pty pydoc requests runpy setuptools shelve shutil
signal site smtplib socket ssl subprocess sys tempfile threading timeit trace types urllib uuid venv webbrowser zipimport _pickle
"""
_HARMLESS = """
builtins.bool builtins.bytearray builtins.bytes builtins.complex builtins.dict builtins.float builtins.frozenset builtins.int builtins.list
builtins.object builtins.range builtins.set builtins.slice builtins.str builtins.tuple functools.partial pathlib.PosixPath pathlib.WindowsPath
pathlib.PurePosixPath types.SimpleNamespace uuid.UUID
"""
_REACHING_MODULES = frozenset(_REACHING.split())
_HARMLESS_NAMES = frozenset(_HARMLESS.split())


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function that a pickle mentions. It is not looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Dotted name; Python 2's `__builtin__` is `builtins`."""
        module = "builtins" if self.module in ("__builtin__", "__builtins__") else self.module
        return f"{module}.{self.name}"

    @property
    def suspicious(self) -> bool:
        """Whether calling it could touch the machine: it is of a module that reaches files, processes or the interpreter."""
        path = self.path
        return path.split(".")[0] in _REACHING_MODULES and path not in _HARMLESS_NAMES


@dataclass(slots=True, eq=False, repr=False)
class ForeignObject:
    """What ordinary unpickling would build by running code: kept as a description.

    Attributes:
        callable: What would be called, usually a `Global`.
        args: With which arguments.
        state: What would be set on it afterwards.
        items: What would be appended, or (key, value) pairs that would be set.
    """

    callable: object
    args: object
    state: object = None
    items: list[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Dotted name of the callable."""
        return self.callable.path if isinstance(self.callable, Global) else "an object"


@dataclass(slots=True, eq=False, repr=False)
class ArrayDtype:
    """A NumPy dtype under construction."""

    code: str
    order: str = "="

    def resolve(self) -> np.dtype[np.generic] | None:
        """The dtype, or None for one that is not a plain number."""
        if not _DTYPE_CODE.match(self.code) or self.order not in ("<", ">", "=", "|"):
            return None
        try:
            dtype: np.dtype[np.generic] = np.dtype(self.order + self.code)
        except TypeError:
            return None
        return dtype


@dataclass(slots=True, eq=False, repr=False)
class ArrayObject:
    """A NumPy array under construction; `tensor` stays None where it holds no plain numbers."""

    tensor: LazyTensor | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Latin1:
    """Bytes that a pickle spells as text; encoded only where they are used, to hold large weights once."""

    text: str


def build(target: object, state: object) -> None:
    """The BUILD opcode: what ordinary unpickling would set on `target`.

    Raises:
        MalformedError: The state of an array does not fit it.
    """
    if isinstance(target, ForeignObject):
        target.state = state
    elif isinstance(target, ArrayDtype) and isinstance(state, tuple) and len(state) >= 2 and isinstance(state[1], str):
        target.order = state[1]
    elif isinstance(target, ArrayObject) and isinstance(state, tuple) and len(state) == 5:
        target.tensor = _array(state[4], state[2], shape=state[1], fortran=bool(state[3]) if isinstance(state[3], (bool, int)) else False)
    # Attributes of dicts (torch's `_metadata`) and of anything else carry no weights.


def evaluate(target: object, args: object) -> object:
    """The REDUCE opcode: our own arithmetic for the callables of tensors, a ForeignObject for everything else.

    Raises:
        MalformedError: The arguments of a known callable do not fit it.
    """
    handler = _HANDLERS.get(target.path) if isinstance(target, Global) else None
    if handler is None or not isinstance(args, tuple):
        return ForeignObject(target, args)
    try:
        return handler(args)
    except (IndexError, TypeError, KeyError, AttributeError) as error:
        raise MalformedError(f"the arguments of {target.path} are not what they must be") from error  # type: ignore[attr-defined]


def _rebuild_tensor(args: tuple[object, ...]) -> object:
    storage, offset, shape, strides = args[:4]
    if isinstance(storage, ForeignObject) and storage.name == "torch.storage._load_from_bytes":
        raise MalformedError("its tensors were written by pickle.dump, each with a file inside it; write them with torch.save")
    if not isinstance(storage, Storage):
        raise MalformedError("a tensor has no storage")
    sizes, steps = as_shape(shape), _as_strides(strides)
    if len(sizes) != len(steps):
        raise MalformedError("a tensor has another number of strides than of sizes")
    return storage.view(sizes, steps, as_count(offset))


def _as_strides(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise MalformedError("the strides of a tensor are not a list")
    return tuple(as_count(stride) for stride in value)


def _first(args: tuple[object, ...]) -> object:
    return args[0]


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    target, inner = args[0], args[2]
    known = isinstance(target, Global) and target.path.startswith("torch._utils._rebuild_")
    return evaluate(target, inner) if known else ForeignObject(target, inner)


def _ordered_dict(args: tuple[object, ...]) -> object:
    result: dict[object, object] = {}
    if args and isinstance(args[0], dict):
        raise MalformedError("an OrderedDict is copied from another dict, which no writer of checkpoints does")
    if args and isinstance(args[0], (list, tuple)):
        if len(args[0]) > _MAX_PAIRS:
            raise MalformedError("an OrderedDict has more than a million items")
        for pair in args[0]:
            key, value = pair
            result[as_key(key)] = value
    return result


def as_key(value: object) -> object:
    """`value` as a dict key. What Python could not hash, or only by recursion, is replaced by an inert object."""
    plain = (str, int, float, bytes, type(None), Global, ForeignObject)
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value)):
        return value
    return ForeignObject(Global("builtins", "object"), ())


def _encode(args: tuple[object, ...]) -> object:
    text, encoding = args[0], args[1] if len(args) > 1 else "utf-8"
    if isinstance(text, str) and encoding in ("latin1", "latin-1", "iso-8859-1"):
        return Latin1(text)
    return ForeignObject(Global("_codecs", "encode"), args)


def _array_dtype(args: tuple[object, ...]) -> object:
    code = args[0]
    return ArrayDtype(code) if isinstance(code, str) else ForeignObject(Global("numpy", "dtype"), args)


def _from_buffer(args: tuple[object, ...]) -> object:
    data, dtype, shape, order = args[:4]
    return ArrayObject(_array(data, dtype, shape=shape, fortran=order == "F"))


def _array(data: object, dtype: object, *, shape: object, fortran: bool) -> LazyTensor | None:
    resolved = dtype.resolve() if isinstance(dtype, ArrayDtype) else None
    if isinstance(data, Latin1):
        data = data.text
    if resolved is None or not isinstance(data, (bytes, bytearray, memoryview, str)):
        return None
    return array_tensor(data, resolved, shape=as_shape(shape), fortran=fortran)


_HANDLERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    # A set is read as the list of its items, which needs no hash; protocols before 4 write it as a call.
    "builtins.set": lambda args: args[0] if args else [],
    "builtins.frozenset": lambda args: args[0] if args else (),
    "torch.Size": _first,
    "torch.device": _first,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.dtype": _array_dtype,
    **{f"numpy.{core}.multiarray._reconstruct": lambda args: ArrayObject() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
