"""What a pickle may become here: plain data, tensors, and inert objects for everything else.

A short list of callables is evaluated by our own arithmetic, because torch and NumPy write tensors as calls of them.
Every other callable, however harmless it looks, becomes a `ForeignObject` that only remembers its name and arguments.
Nothing is imported.
Source: torch/_utils.py and torch/storage.py (https://github.com/pytorch/pytorch), numpy/_core/src/multiarray/methods.c
(`__reduce__`).

A part of a mapped file as the stream that `pickletools.genops` reads, without copying what is large.

A pickle read as data: an interpreter of the opcodes that calls nothing and imports nothing.

`pickle.Unpickler` runs what the file says. Here the opcodes move plain data on a stack; a class or function is only a
name (`Global`), and a call of it only a record (`ForeignObject`), but for the few that torch and NumPy write tensors
with, which `pickle_values` evaluates by its own arithmetic. Work and memory are bounded by the size of the file.
Source: the opcode table of `pickletools`, and `pickle.py` for what each opcode does to stack and memo.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .lazy import LazyTensor, MalformedError, Storage, array_tensor, as_count, as_shape

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
        target.tensor = _array(
            state[4], state[2], shape=state[1], fortran=bool(state[3]) if isinstance(state[3], (bool, int)) else False
        )


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
        raise MalformedError(
            "its tensors were written by pickle.dump, each with a file inside it; write them with torch.save"
        )
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
_LARGE_READ = 1 << 16
_MAX_LINE = 1 << 28
_ESCAPES = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2})")
_ESCAPED = (b"S", b"c", b"i", b"P")  # opcodes whose text `genops` unescapes


class PickleStream:
    """A part of a buffer as the file that `pickletools.genops` reads: small reads are bytes, large ones views of the buffer.

    Args:
        buffer: Usually a mapped file.
        start: First byte.
        end: After the last byte.
    """

    def __init__(self, buffer: bytes | mmap.mmap, start: int, end: int) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._position = start
        self._end = end
        self._last: bytes | memoryview = b""

    def tell(self) -> int:
        """Offset in the buffer."""
        return self._position

    @property
    def exhausted(self) -> bool:
        """Whether all bytes were read."""
        return self._position >= self._end

    def read(self, size: int) -> bytes | memoryview:
        """`size` bytes, or what is left."""
        start = self._position
        self._position = end = min(start + max(size, 0), self._end)
        self._last = self._view[start:end] if end - start > _LARGE_READ else self._buffer[start:end]
        return self._last

    def readline(self) -> bytes:
        """Up to and including the next line feed.

        Raises:
            MalformedError: It is text with an escape that Python 2 never wrote, of which `genops` would warn.
        """
        start = self._position
        found = self._buffer.find(b"\n", start, min(start + _MAX_LINE, self._end))
        self._position = found + 1 if found >= 0 else self._end
        line = self._buffer[start : self._position] if found >= 0 else b""
        if self._last in _ESCAPED and b"\\" in _ESCAPES.sub(b"", line):
            raise MalformedError(f"the pickle has an invalid escape at byte {start}")
        return line


MAX_OPERATIONS = 2_000_000
_PUSHING = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_PUSH = frozenset(_PUSHING.split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset(["PROTO", "FRAME", "STOP", "READONLY_BUFFER"])


def read_pickle(
    stream: PickleStream, persistent: Callable[[object], object] | None = None
) -> tuple[object, frozenset[str]]:
    """Reads one pickle.

    Args:
        stream: Stands after the pickle when this returns.
        persistent: Gives the object of a persistent id; None refuses them.

    Returns:
        The object, and the dotted names of suspicious callables that ordinary unpickling would have imported, and
        perhaps called.

    Raises:
        MalformedError: The bytes are not a pickle, are truncated, or would need absurd work.
    """
    machine = _Machine(persistent)
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            count += 1
            if count > MAX_OPERATIONS:
                raise MalformedError(f"the pickle has more than {MAX_OPERATIONS:,} opcodes, which no checkpoint needs")
            machine.step(opcode.name, argument)
        return machine.pop(), frozenset(machine.suspicious)
    except MalformedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        what = "ends too early (the file is truncated)" if stream.exhausted else "is damaged"
        raise MalformedError(f"the pickle {what} at byte {stream.tell()}") from error


class _Machine:
    """Stack, marks and memo."""

    def __init__(self, persistent: Callable[[object], object] | None) -> None:
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._persistent = persistent
        self._handlers = {name[4:].upper(): getattr(self, name) for name in dir(self) if name.startswith("_op_")}
        self.suspicious: set[str] = set()

    def step(self, name: str, argument: object) -> None:
        """Executes one opcode."""
        if name in _PUSH:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = tuple(self.pop() for _ in range(size))
            self._stack.append(items[::-1])
        elif name in self._handlers:
            self._handlers[name](argument)
        elif name not in _IGNORED:
            raise MalformedError(f"the pickle uses {name}, which no checkpoint needs")

    def pop(self) -> object:
        """The top of the stack."""
        return self._stack.pop()

    def _pop_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _op_mark(self, _: object) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _op_pop(self, _: object) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _op_pop_mark(self, _: object) -> None:
        self._pop_mark()

    def _op_dup(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def _op_empty_tuple(self, _: object) -> None:
        self._stack.append(())

    def _op_tuple(self, _: object) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _op_empty_list(self, _: object) -> None:
        self._stack.append([])

    # A set is read as a list: nothing asks whether something is in it, and its items need no hash.
    _op_empty_set = _op_empty_list

    def _op_list(self, _: object) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    _op_frozenset = _op_tuple

    def _op_empty_dict(self, _: object) -> None:
        self._stack.append({})

    def _op_dict(self, _: object) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _op_append(self, _: object) -> None:
        item = self.pop()
        self._extend([item])

    def _op_appends(self, _: object) -> None:
        self._extend(self._pop_mark())

    _op_additems = _op_appends

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, ForeignObject):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise MalformedError("the pickle appends to something that is not a list")

    def _op_setitem(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: object) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, ForeignObject):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((as_key(key), value) for key, value in pairs)
        else:
            raise MalformedError("the pickle sets items of something that is not a dict")

    def _op_put(self, argument: object) -> None:
        assert isinstance(argument, int)
        self._memo[argument] = self._stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_get(self, argument: object) -> None:
        assert isinstance(argument, int)
        self._stack.append(self._memo[argument])

    _op_binget = _op_long_binget = _op_get

    def _op_global(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self._push_global(Global(module, name))

    def _push_global(self, named: Global) -> None:
        # A mention counts, called or not: `functools.partial(os.system, …)` calls it by a detour.
        if named.suspicious:
            self.suspicious.add(named.path)
        self._stack.append(named)

    def _op_stack_global(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedError("the pickle names a class by something that is not text")
        self._push_global(Global(module, name))

    def _op_ext1(self, argument: object) -> None:
        # The extension registry of the process is not asked: a code stays a code.
        self._stack.append(Global("copyreg.extension", str(argument)))

    _op_ext2 = _op_ext4 = _op_ext1

    def _op_reduce(self, _: object) -> None:
        args, target = self.pop(), self.pop()
        self._stack.append(evaluate(target, args))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: object) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self._stack.append(evaluate(target, args if not keywords else [args, keywords]))

    def _op_inst(self, argument: object) -> None:
        args = tuple(self._pop_mark())
        self._op_global(argument)
        self._stack.append(evaluate(self.pop(), args))

    def _op_obj(self, _: object) -> None:
        items = self._pop_mark()
        self._stack.append(evaluate(items[0], tuple(items[1:])))

    def _op_build(self, _: object) -> None:
        state = self.pop()
        target = self._stack[-1]
        build(target, state)

    def _op_binpersid(self, _: object) -> None:
        if self._persistent is None:
            raise MalformedError("the pickle refers to objects outside itself")
        self._stack.append(self._persistent(self.pop()))

    def _op_persid(self, argument: object) -> None:
        self._stack.append(argument)
        self._op_binpersid(None)
