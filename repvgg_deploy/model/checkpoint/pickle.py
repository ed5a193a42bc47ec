"""A pickle read as data: nothing is called or imported, and work and memory are bounded by the size of the file.

`pickle.Unpickler` runs what a file says. Here the opcodes move plain data on a stack; a class or function is only a
name (`Global`), and a call of it only a record of name and arguments (`ForeignObject`), however harmless it looks. The
few callables that torch and NumPy write tensors with (`_HANDLERS`) are evaluated by arithmetic of our own.
Source: the opcode table of `pickletools`, and `pickle.py` for what each opcode does to stack and memo; torch/_utils.py
and torch/storage.py (https://github.com/pytorch/pytorch), numpy/_core/src/multiarray/methods.c (`__reduce__`).
"""

from __future__ import annotations

import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import CheckpointError
from .lazy import Dtype, LazyTensor, MalformedError, Storage, array_tensor, as_count, as_shape, named_dtype, placeholder

_MAX_OPERATIONS = 2_000_000
_MAX_PAIRS = 1_000_000
_MAX_LINE = 1 << 28
_LARGE_READ = 1 << 16
_ESCAPED = (b"S", b"c", b"i", b"P")  # opcodes whose text `genops` unescapes
_ESCAPES = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2})")
_DTYPE_CODE = re.compile(r"[fiubc](1|2|4|8|16)\Z")
_PUSHING = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_PUSH = frozenset(_PUSHING.split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A set is read as the list of its items: nothing asks whether something is in it, and its items need no hash.
_EMPTY: dict[str, type] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_FROM_MARK: dict[str, type] = {"TUPLE": tuple, "LIST": list, "FROZENSET": tuple}
_IGNORED = frozenset(["PROTO", "FRAME", "STOP", "READONLY_BUFFER"])
_REACHING = """
asyncio bdb builtins code codeop commands ctypes distutils ensurepip fileinput ftplib functools glob http imp importlib
io linecache marshal multiprocessing nt operator os pathlib pdb pickle pip pkgutil platform posix posixpath profile pty
pydoc requests runpy setuptools shelve shutil signal site smtplib socket ssl subprocess sys tempfile threading timeit
trace types urllib uuid venv webbrowser zipimport _pickle
"""
_HARMLESS = """
builtins.bool builtins.bytearray builtins.bytes builtins.complex builtins.dict builtins.float builtins.frozenset
builtins.int builtins.list builtins.object builtins.range builtins.set builtins.slice builtins.str builtins.tuple
functools.partial pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath types.SimpleNamespace uuid.UUID
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
        """Whether calling it could touch the machine: its module reaches files, processes or the interpreter."""
        return self.path.split(".")[0] in _REACHING_MODULES and self.path not in _HARMLESS_NAMES


@dataclass(slots=True, eq=False, repr=False)
class ForeignObject:
    """What ordinary unpickling would build by running code: kept as a description.

    Attributes:
        callable: What would be called, usually a `Global`.
        args: The arguments of the call.
        state: What would be set on the result afterwards.
        items: What would be appended to it, or (key, value) pairs that would be set.
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
class ArrayObject:
    """A NumPy array; `tensor` stays None where it holds no plain numbers."""

    tensor: LazyTensor | None = None


class PickleStream:
    """A part of a mapped file as the file that `pickletools.genops` reads: small reads are bytes, large ones views."""

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
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count >= _MAX_OPERATIONS:
                raise MalformedError(f"the pickle has more than {_MAX_OPERATIONS:,} opcodes, which no checkpoint needs")
            machine.step(opcode.name, argument)
        return machine.pop(), frozenset(machine.suspicious)
    except MalformedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        what = "ends too early (the file is truncated)" if stream.exhausted else "is damaged"
        raise MalformedError(f"the pickle {what} at byte {stream.tell()}") from error


class _Machine:
    """Stack, marks and memo of a pickle, and what each opcode does to them."""

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
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in _TUPLES:
            items = tuple(self.pop() for _ in range(_TUPLES[name]))
            self._push(items[::-1])
        elif name in _EMPTY:
            self._push(_EMPTY[name]())
        elif name in _FROM_MARK:
            self._push(_FROM_MARK[name](self._op_pop_mark()))
        elif name in self._handlers:
            self._handlers[name](argument)
        elif name not in _IGNORED:
            raise MalformedError(f"the pickle uses {name}, which no checkpoint needs")

    def pop(self) -> object:
        """The top of the stack."""
        return self._stack.pop()

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _op_mark(self, _: object) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _op_pop(self, _: object) -> None:
        if self._stack:
            self.pop()
        else:
            self._op_pop_mark()

    def _op_pop_mark(self, _: object = None) -> list[object]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _op_dup(self, _: object) -> None:
        self._push(self._stack[-1])

    def _op_append(self, _: object) -> None:
        self._extend([self.pop()])

    def _op_appends(self, _: object) -> None:
        self._extend(self._op_pop_mark())

    _op_additems = _op_appends

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, ForeignObject):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise MalformedError("the pickle appends to something that is not a list")

    def _op_dict(self, _: object) -> None:
        items = self._op_pop_mark()
        self._push({})
        self._set_items(items)

    def _op_setitem(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: object) -> None:
        self._set_items(self._op_pop_mark())

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, ForeignObject):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((_as_key(key), value) for key, value in pairs)
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
        self._push(self._memo[argument])

    _op_binget = _op_long_binget = _op_get

    def _op_global(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self._push_global(Global(module, name))

    def _push_global(self, named: Global) -> None:
        # A mention counts, called or not: `functools.partial(os.system, …)` calls it by a detour.
        if named.suspicious:
            self.suspicious.add(named.path)
        self._push(named)

    def _op_stack_global(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedError("the pickle names a class by something that is not text")
        self._push_global(Global(module, name))

    def _op_ext1(self, argument: object) -> None:
        # The extension registry of the process is not asked: a code stays a code.
        self._push(Global("copyreg.extension", str(argument)))

    _op_ext2 = _op_ext4 = _op_ext1

    def _op_reduce(self, _: object) -> None:
        args, target = self.pop(), self.pop()
        self._push(_evaluate(target, args))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: object) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self._push(_evaluate(target, args if not keywords else [args, keywords]))

    def _op_inst(self, argument: object) -> None:
        args = tuple(self._op_pop_mark())
        self._op_global(argument)
        self._push(_evaluate(self.pop(), args))

    def _op_obj(self, _: object) -> None:
        items = self._op_pop_mark()
        self._push(_evaluate(items[0], tuple(items[1:])))

    def _op_build(self, _: object) -> None:
        """What ordinary unpickling would set on an object that stands already."""
        state = self.pop()
        target = self._stack[-1]
        if isinstance(target, ForeignObject):
            target.state = state
        elif isinstance(target, ArrayObject) and isinstance(state, tuple) and len(state) == 5:
            fortran = isinstance(state[3], (bool, int)) and bool(state[3])
            target.tensor = _array(state[4], state[2], shape=state[1], fortran=fortran)

    def _op_binpersid(self, _: object) -> None:
        if self._persistent is None:
            raise MalformedError("the pickle refers to objects outside itself")
        self._push(self._persistent(self.pop()))

    def _op_persid(self, argument: object) -> None:
        self._push(argument)
        self._op_binpersid(None)


def _as_key(value: object) -> object:
    """`value` as a dict key. What Python could not hash, or only by recursion, is replaced by an inert object."""
    plain = (str, int, float, bytes, type(None), Global, ForeignObject)
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value)):
        return value
    return ForeignObject(Global("builtins", "object"), ())


def _evaluate(target: object, args: object) -> object:
    """A call: our own arithmetic for the callables of tensors, a `ForeignObject` for everything else."""
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
        raise CheckpointError(
            "its tensors were written by pickle.dump, each with a file inside it, not by torch.save",
            remedy='where you trust its source: python -c "import pickle, torch; '
            "torch.save(pickle.load(open('FILE', 'rb')), 'model.pth')\"",
        )
    if not isinstance(storage, Storage):
        raise MalformedError("a tensor has no storage")
    sizes = as_shape(shape)
    if not isinstance(strides, (tuple, list)):
        raise MalformedError("the strides of a tensor are not a list")
    steps = tuple(as_count(stride) for stride in strides)
    if len(sizes) != len(steps):
        raise MalformedError("a tensor has another number of strides than of sizes")
    return storage.view(sizes, steps, as_count(offset))


def _rebuild_typed_tensor(args: tuple[object, ...]) -> object:
    """A tensor of a dtype that has no storage class: its storage is bytes, its strides count elements."""
    storage, *place = args[:4]
    dtype = _torch_dtype(args[6])
    return _rebuild_tensor((replace(storage, dtype=dtype) if isinstance(storage, Storage) else storage, *place))


def _torch_dtype(named: object) -> Dtype:
    if not isinstance(named, Global) or named.module != "torch":
        raise MalformedError("a tensor has no known dtype")
    return named_dtype(named.name)


def _rebuild_sparse(args: tuple[object, ...]) -> object:
    parts = args[1] if isinstance(args[1], tuple) else ()
    shape = next((part for part in parts if isinstance(part, (tuple, list))), ())
    return placeholder(named_dtype("float32"), as_shape(shape), "a sparse tensor")


def _rebuild_quantized(args: tuple[object, ...]) -> object:
    return placeholder(named_dtype("qint8"), as_shape(args[2]), "a quantized tensor")


def _rebuild_subclass(args: tuple[object, ...]) -> object:
    kind, dtype, shape = args[:3]
    name = kind.name if isinstance(kind, Global) else "a subclass"
    what = "a DTensor: a shard of a distributed tensor" if name == "DTensor" else f"a tensor of the class {name}"
    return placeholder(_torch_dtype(dtype), as_shape(shape), what)


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    target, inner = args[0], args[2]
    known = isinstance(target, Global) and target.path.startswith("torch._utils._rebuild_")
    return _evaluate(target, inner) if known else ForeignObject(target, inner)


def _encode_text(args: tuple[object, ...]) -> object:
    """Protocols before 3 spell bytes as Latin-1 text; long ones, which are arrays, are encoded when they are used."""
    text = args[0]
    if (
        isinstance(text, str)
        and len(text) <= _LARGE_READ
        and max(text, default="") <= "\xff"
        and args[1:] == ("latin1",)
    ):
        return text.encode("latin-1")
    return ForeignObject(Global("_codecs", "encode"), args)


def _first(args: tuple[object, ...]) -> object:
    return args[0]


def _ordered_dict(args: tuple[object, ...]) -> object:
    items = args[0] if args else ()
    if isinstance(items, dict):
        raise MalformedError("an OrderedDict is copied from another dict, which no writer of checkpoints does")
    if not isinstance(items, (list, tuple)):
        return {}
    if len(items) > _MAX_PAIRS:
        raise MalformedError("an OrderedDict has more than a million items")
    result: dict[object, object] = {}
    for key, value in items:
        result[_as_key(key)] = value
    return result


def _from_buffer(args: tuple[object, ...]) -> object:
    data, dtype, shape, order = args[:4]
    return ArrayObject(_array(data, dtype, shape=shape, fortran=order == "F"))


def _array(data: object, dtype: object, *, shape: object, fortran: bool) -> LazyTensor | None:
    """None where the elements are not plain numbers."""
    if isinstance(data, ForeignObject) and data.name == "_codecs.encode" and isinstance(data.args, tuple):
        data = data.args[0] if data.args[1:2] in (("latin1",), ("latin-1",), ("iso-8859-1",)) else None
    elements = _plain_dtype(dtype)
    if elements is None or not isinstance(data, (bytes, bytearray, memoryview, str)):
        return None
    return array_tensor(data, elements, shape=as_shape(shape), fortran=fortran)


def _plain_dtype(dtype: object) -> np.dtype[np.generic] | None:
    """The dtype that a call of `numpy.dtype` and the state set on it afterwards describe; None unless of numbers."""
    if not (isinstance(dtype, ForeignObject) and dtype.name == "numpy.dtype" and isinstance(dtype.args, tuple)):
        return None
    code = dtype.args[0] if dtype.args else None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
    if not isinstance(code, str) or not _DTYPE_CODE.match(code) or order not in ("<", ">", "=", "|"):
        return None
    try:
        return np.dtype(order + code)
    except TypeError:
        return None


_HANDLERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda args: placeholder(
        _torch_dtype(args[0]), as_shape(args[1]), "a meta tensor: a shape without values"
    ),
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse,
    "torch._utils._rebuild_qtensor": _rebuild_quantized,
    "torch._utils._rebuild_wrapper_subclass": _rebuild_subclass,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "_codecs.encode": _encode_text,
    "torch.Size": _first,
    "torch.device": _first,
    "collections.OrderedDict": _ordered_dict,
    # Protocols before 4 write a set as a call; it is read as the list of its items here, too.
    "builtins.set": lambda args: args[0] if args else [],
    "builtins.frozenset": lambda args: args[0] if args else (),
    **{f"numpy.{core}.multiarray._reconstruct": lambda args: ArrayObject() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
