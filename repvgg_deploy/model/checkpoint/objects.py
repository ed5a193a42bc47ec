"""What a pickle describes, all of it inert: names, calls, and the calls that make tensors.

A class or function is only a name (`Global`), and a call of it only a record of name and arguments (`ForeignObject`),
however harmless it looks. The few callables that torch and NumPy write tensors with (`_HANDLERS`) are evaluated by
arithmetic of our own.
Source: torch/_utils.py and torch/storage.py (https://github.com/pytorch/pytorch),
numpy/_core/src/multiarray/methods.c (`__reduce__`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...errors import CheckpointError
from .lazy import Dtype, LazyTensor, MalformedError, Storage, array_tensor, as_count, as_shape, named_dtype, placeholder

_PAIR_BYTES = 128
_MAX_KEY_BITS = 64  # longer numbers can be made to collide
_LONG_TEXT = 1 << 16
_DTYPE_CODE = re.compile(r"[fiubc](1|2|4|8|16)\Z")
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


def attributes_of(node: ForeignObject) -> dict[object, object]:
    """What a pickled object has in its `__dict__`; a `torch.fx.GraphModule` is rebuilt from it."""
    state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
    if state is None and is_graph_module(node) and isinstance(node.args, tuple) and node.args:
        state = node.args[0]
    return state if isinstance(state, dict) else {}


def is_graph_module(node: ForeignObject) -> bool:
    """Whether it is a module that torch.fx traced: what it computes is text in it, not its submodules."""
    return node.name.startswith("torch.fx.graph_module.")


def class_of(node: ForeignObject) -> str:
    """Dotted name of the class of a pickled object."""
    named = node.callable
    if isinstance(named, Global) and named.path in ("copyreg._reconstructor", "copy_reg._reconstructor"):
        named = node.args[0] if isinstance(node.args, tuple) and node.args else None
    return named.path if isinstance(named, Global) else "an unknown class"


def as_key(value: object) -> object:
    """`value` as a dict key; an inert object in place of what Python cannot hash at once.

    Such are tuples, whose hash is of all that they hold and can be made to collide, and numbers of any length.
    """
    plain = (str, float, bytes, type(None), Global, ForeignObject)
    if isinstance(value, plain) or (isinstance(value, int) and value.bit_length() <= _MAX_KEY_BITS):
        return value
    return ForeignObject(Global("builtins", "object"), ())


def cost_of_call(target: object, args: object) -> int:
    """Bytes that `evaluate` copies of the arguments, which a pickle may give any number of times."""
    first = args[0] if isinstance(args, tuple) and args else None
    if not isinstance(target, Global) or target.path not in ("collections.OrderedDict", "_codecs.encode"):
        return 0
    return _PAIR_BYTES * len(first) if isinstance(first, (list, tuple)) else sys.getsizeof(first)


def evaluate(target: object, args: object) -> object:
    """A call: our own arithmetic for the callables of tensors, a `ForeignObject` for everything else."""
    handler = _HANDLERS.get(target.path) if isinstance(target, Global) else None
    if handler is None or not isinstance(args, tuple):
        return ForeignObject(target, args)
    try:
        return handler(args)
    except (IndexError, TypeError, KeyError, AttributeError) as error:
        raise MalformedError(f"the arguments of {target.path} are not what they must be") from error  # type: ignore[attr-defined]


def _rebuild_tensor(args: tuple[object, ...], dtype: Dtype | None = None) -> object:
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
    if len(sizes) != len(strides):
        raise MalformedError("a tensor has another number of strides than of sizes")
    steps = tuple(as_count(stride) for stride in strides)
    return storage.view(sizes, steps, as_count(offset), dtype)


def _rebuild_typed_tensor(args: tuple[object, ...]) -> object:
    """A tensor of a dtype that has no storage class: its storage is bytes, its strides count elements."""
    return _rebuild_tensor(args, _torch_dtype(args[6]))


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
    return evaluate(target, inner) if known else ForeignObject(target, inner)


def _encode_text(args: tuple[object, ...]) -> object:
    """Protocols before 3 spell bytes as Latin-1 text; long ones, which are arrays, are encoded when they are used."""
    text = args[0]
    is_short = isinstance(text, str) and len(text) <= _LONG_TEXT and len(args) == 2 and args[1] == "latin1"
    if isinstance(text, str) and is_short and max(text, default="") <= "\xff":
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
    result: dict[object, object] = {}
    for key, value in items:
        result[as_key(key)] = value
    return result


def _from_buffer(args: tuple[object, ...]) -> object:
    data, dtype, shape, order = args[:4]
    return ArrayObject(array_of(data, dtype, shape=shape, fortran=order == "F"))


def array_of(data: object, dtype: object, *, shape: object, fortran: bool) -> LazyTensor | None:
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
