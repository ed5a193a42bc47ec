"""A pickle read as data: nothing is called or imported, and work and memory are bounded by the size of the file.

Every opcode pays for the objects that it makes, in bytes: a file may make 96 MiB, and twice its own size. Time is paid
with them, because no opcode does work that it does not pay for.
`pickle.Unpickler` runs what a file says. Here the opcodes move plain data and descriptions (`objects`) on a stack.
Source: the opcode table of `pickletools`, and `pickle.py` for what each opcode does to stack and memo.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import sys
from collections.abc import Callable

from .lazy import MalformedError
from .objects import ArrayObject, ForeignObject, Global, array_of, as_key, cost_of_call, evaluate

_ALLOWED_FLOOR = 96 << 20
_ALLOWED_RATIO = 2
_OPCODE_BYTES = 48  # what an opcode puts on the stack: a number, a short tuple, a reference
_CALL_BYTES = 1000  # a tensor that was not read yet
_MORE_BYTES = {"EMPTY_LIST": 32, "EMPTY_DICT": 32, "EMPTY_SET": 32, "MARK": 32, "LIST": 32, "DICT": 32, "MEMOIZE": 64,
               "PUT": 64, "BINPUT": 64, "LONG_BINPUT": 64, "BUILD": _CALL_BYTES}  # fmt: skip
_MAX_LINE = 1 << 28
_MAX_GLOBAL = 1000
_LARGE_READ = 1 << 16
_ESCAPED = (b"S", b"c", b"i", b"P")  # opcodes whose text `genops` unescapes
_ESCAPES = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2})")
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


class PickleStream:
    """A part of a mapped file as the file that `pickletools.genops` reads: small reads are bytes, large ones views."""

    def __init__(self, buffer: bytes | mmap.mmap, start: int, end: int, stored: int | None = None) -> None:
        """Of the bytes from `start` to `end`; `stored` is how many they are in the file, where they were deflated."""
        self._left = _ALLOWED_FLOOR + _ALLOWED_RATIO * (end - start)
        if stored is not None:  # what was inflated takes memory, too
            self._left = _ALLOWED_FLOOR + _ALLOWED_RATIO * stored - (end - start)
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._position = start
        self._end = end
        self._last: bytes | memoryview = b""

    def spend(self, nbytes: int) -> None:
        """Pays for what is made of the stream.

        Raises:
            MalformedError: It is more than a file of this size may cost.
        """
        self._left -= nbytes
        if self._left < 0:
            raise MalformedError("the pickle would take more memory and time than a checkpoint of its size needs")

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
    machine = _Machine(persistent, stream.spend)
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return machine.pop(), frozenset(machine.suspicious)
    except MalformedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        what = "ends too early (the file is truncated)" if stream.exhausted else "is damaged"
        raise MalformedError(f"the pickle {what} at byte {stream.tell()}") from error


class _Machine:
    """Stack, marks and memo of a pickle, and what each opcode does to them."""

    def __init__(self, persistent: Callable[[object], object] | None, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._persistent = persistent
        self._handlers = {name[4:].upper(): getattr(self, name) for name in dir(self) if name.startswith("_op_")}
        self.suspicious: set[str] = set()

    def step(self, name: str, argument: object) -> None:
        """Executes one opcode."""
        self._spend(_OPCODE_BYTES + _MORE_BYTES.get(name, 0))
        if name in _PUSH:
            if isinstance(argument, (str, bytes, int)):
                self._spend(sys.getsizeof(argument))
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
        self._push(self._memo[argument])

    _op_binget = _op_long_binget = _op_get

    def _op_global(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self._push_global(Global(module, name))

    def _push_global(self, named: Global) -> None:
        if len(named.module) + len(named.name) > _MAX_GLOBAL:
            raise MalformedError("the pickle names a class by a text that is too long for a name")
        # A mention counts, called or not: `functools.partial(os.system, …)` calls it by a detour.
        if named.suspicious:
            self._spend(sys.getsizeof(named.path))
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
        self._push(self._evaluate(target, args))

    def _evaluate(self, target: object, args: object) -> object:
        self._spend(cost_of_call(target, args) + _CALL_BYTES)
        return evaluate(target, args)

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: object) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self._push(self._evaluate(target, args if not keywords else [args, keywords]))

    def _op_inst(self, argument: object) -> None:
        args = tuple(self._op_pop_mark())
        self._op_global(argument)
        self._push(self._evaluate(self.pop(), args))

    def _op_obj(self, _: object) -> None:
        items = self._op_pop_mark()
        self._push(self._evaluate(items[0], tuple(items[1:])))

    def _op_build(self, _: object) -> None:
        """What ordinary unpickling would set on an object that stands already."""
        state = self.pop()
        target = self._stack[-1]
        if isinstance(target, ForeignObject):
            target.state = state
        elif isinstance(target, ArrayObject) and isinstance(state, tuple) and len(state) == 5:
            fortran = isinstance(state[3], (bool, int)) and bool(state[3])
            target.tensor = array_of(state[4], state[2], shape=state[1], fortran=fortran)

    def _op_binpersid(self, _: object) -> None:
        if self._persistent is None:
            raise MalformedError("the pickle refers to objects outside itself")
        self._push(self._persistent(self.pop()))

    def _op_persid(self, argument: object) -> None:
        self._push(argument)
        self._op_binpersid(None)
