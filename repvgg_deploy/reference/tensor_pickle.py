"""A pickle read as data: an interpreter of the opcodes that calls nothing and imports nothing.

`pickle.Unpickler` runs what the file says. Here the opcodes move plain data on a stack; a class or function is only a name (`Global`), and
a call of it only a record (`ForeignObject`), but for the few that torch and NumPy write tensors with, which `pickle_values` evaluates by its own
arithmetic. Work and memory are bounded by the size of the file.
Source: the opcode table of `pickletools`, and `pickle.py` for what each opcode does to stack and memo.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable

from .lazy_tensor import MalformedError
from .pickle_stream import PickleStream
from .pickle_values import ForeignObject, Global, as_key, build, evaluate

MAX_OPERATIONS = 2_000_000
_PUSHING = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_PUSH = frozenset(_PUSHING.split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset(["PROTO", "FRAME", "STOP", "READONLY_BUFFER"])


def read_pickle(stream: PickleStream, persistent: Callable[[object], object] | None = None) -> tuple[object, frozenset[str]]:
    """Reads one pickle.

    Args:
        stream: Stands after the pickle when this returns.
        persistent: Gives the object of a persistent id; None refuses them.

    Returns:
        The object, and the dotted names of suspicious callables that ordinary unpickling would have imported, and perhaps called.

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
