"""Pickles are read as data: nothing is called, nothing is imported, and hostile ones end in one error."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.model.checkpoint import pickle as tensor_pickle
from repvgg_deploy.model.checkpoint.lazy import FLOAT32, LazyTensor, MalformedError, Storage, printable
from repvgg_deploy.model.checkpoint.objects import ArrayObject, ForeignObject, Global
from repvgg_deploy.model.checkpoint.pickle import PickleStream, read_pickle


def read(data: bytes, persistent=None):
    return read_pickle(PickleStream(data, 0, len(data)), persistent)[0]


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(-(2**63), 2**64 - 1), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(value=_VALUES, protocol=st.integers(3, 5))
def test_plain_data_at_any_protocol_is_read_as_pickle_reads_it(value, protocol):
    assert read(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_nested_data_at_every_protocol_is_read(protocol):
    value = OrderedDict([("a", [1, -(2**70), 0.5, True, None]), ("b", ({"c": "é"}, ())), ("d", "x" * 300)])
    assert read(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2", "i8", "u1", "?"])
def test_array_at_every_protocol_keeps_its_values(protocol, dtype):
    array = (np.arange(24).reshape(2, 3, 4) % 2).astype(dtype)
    found = read(pickle.dumps({"w": array}, protocol=protocol))["w"]
    assert isinstance(found, ArrayObject)
    assert found.tensor is not None
    assert np.array_equal(found.tensor.load().numpy(), array)


def test_fortran_ordered_array_keeps_its_values():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(read(pickle.dumps(array, protocol=4)).tensor.load().numpy(), array)


@pytest.mark.parametrize("dtype", ["U3", "O", "M8[s]", [("a", "f4")]])
def test_array_of_something_else_than_numbers_becomes_no_tensor(dtype):
    found = read(pickle.dumps(np.zeros(2, dtype=dtype), protocol=4))
    assert found.tensor is None


def test_array_whose_data_does_not_fill_its_shape_is_refused():
    data = pickle.dumps(np.zeros(8, dtype=np.float32), protocol=2)
    with pytest.raises(MalformedError, match=r"needs 36 bytes, found 32"):
        read(data.replace(b"K\x08\x85", b"K\x09\x85", 1))


class _Marked:
    """Unpickling it in the ordinary way writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def _hostile_pickles(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value.encode()  # noqa: E731
    return {
        "reduce": pickle.dumps(_Marked(marker)),
        "global reduce": b"cos\nsystem\n(" + text(command) + b"tR.",
        "stack global": b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + text(touch) + b"\x85R.",
        "inst": b"(" + text(command) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(command) + b"o.",
        "newobj": b"\x80\x02cbuiltins\nexec\n" + text(touch) + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cbuiltins\nexec\n" + text(touch) + b"\x85}\x92.",
        "build": b"chostile_module\nHostile\n)R}" + text("x") + b"K\x01sb.",
        "import": b"chostile_module\nHostile\n.",
        "extension": b"\x80\x02\x82\xf0)R.",
        "nested": b"cfunctools\npartial\n(cos\nsystem\n" + text(command) + b"tR)R.",
    }


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """(marker, pickles): the marker exists as soon as anything of them was run or imported."""
    marker = tmp_path / "ran"
    body = f"open({str(marker)!r}, 'w').close()"
    (tmp_path / "hostile_module.py").write_text(
        f"{body}\nclass Hostile:\n    def __setstate__(self, state):\n        {body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    copyreg.add_extension("hostile_module", "Hostile", 0xF0)
    yield marker, _hostile_pickles(marker)
    copyreg.remove_extension("hostile_module", "Hostile", 0xF0)
    sys.modules.pop("hostile_module", None)


def test_hostile_pickles_would_run_if_they_were_unpickled(hostile):
    marker, pickles = hostile
    for name in ("reduce", "stack global", "build", "extension", "import"):
        pickle.loads(pickles[name])
        assert marker.exists(), name
        marker.unlink()
        sys.modules.pop("hostile_module", None)


def test_hostile_pickles_read_as_data_run_and_import_nothing(hostile):
    marker, pickles = hostile
    for name, data in pickles.items():
        value, suspicious = read_pickle(PickleStream(data, 0, len(data)))
        assert isinstance(value, (ForeignObject, Global)), name
        assert suspicious or name in ("build", "import", "extension"), name
    assert not marker.exists()
    assert "hostile_module" not in sys.modules


def test_suspicious_calls_are_named():
    _, suspicious = read_pickle(PickleStream(data := b"cposix\nsystem\n(X\x02\x00\x00\x00lstR.", 0, len(data)))
    assert suspicious == {"posix.system"}
    _, suspicious = read_pickle(PickleStream(data := pickle.dumps({1, 2}, protocol=2), 0, len(data)))
    assert suspicious == frozenset()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"K",
        b"t.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"h\x05.",
        b"K\x01s.",
        b"}K\x01s.",
        b"}(K\x01u.",
        b"K\x01K\x02a.",
        b"0.",
        b"R.",
        b"\x97.",
        b"X\x01\x00\x00\x00\xff.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"Fx\n.",
        b"S'a\n.",
        b"\xff",
        b"K\x01Q.",
        b"S'\\?'\n.",
        b"S'\\777'\n.",
        b"ca\\?\nb\n.",
    ],
)
def test_damaged_pickle_is_refused(data):
    with pytest.raises(MalformedError):
        read(data)


def test_quoted_string_with_the_escapes_of_python_2_is_read():
    assert read(rb"S'a\'\n\x41\\'" + b"\n.") == "a'\nA\\"


def test_array_spelled_as_text_outside_latin_1_is_refused_when_it_is_read():
    data = pickle.dumps(np.zeros(1, dtype=np.float32), protocol=2).replace(
        b"\x04\x00\x00\x00\x00\x00\x00\x00", b"\x05\x00\x00\x00\xd2\xb6\x00\x00\x00"
    )
    with pytest.raises(MalformedError, match="Latin-1"):
        read(data).tensor.load()


def test_cycle_is_read():
    cycle: list[object] = []
    cycle.append(cycle)
    found = read(pickle.dumps(cycle))
    assert found[0] is found


@pytest.mark.parametrize("opening", [b"(", b"]("])
def test_deep_nesting_is_read_or_refused_without_recursion(opening):
    count = 20_000  # twenty times what Python would recurse
    closing = b"t" if opening == b"(" else b"e"
    found = read(opening * count + closing * count + b".")
    assert isinstance(found, (tuple, list))


def test_deeply_nested_key_is_replaced_not_hashed():
    found = read(b"})" + b"\x85" * 20_000 + b"K\x01s.")
    ((key, value),) = found.items()
    assert isinstance(key, ForeignObject)
    assert value == 1


def test_list_as_key_is_replaced():
    assert list(read(b"}]K\x01s.").values()) == [1]


def test_work_beyond_what_the_size_of_the_file_allows_is_refused(monkeypatch):
    monkeypatch.setattr(tensor_pickle, "_ALLOWED_FLOOR", 5000)
    assert read(b"N0" * 40 + b"N.") is None
    with pytest.raises(MalformedError, match="more memory and time"):
        read(b"N0" * 60 + b"N.")


def test_shared_lists_stay_shared():
    data = (
        b"]q\x00"
        + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(100))
        + b"."
    )
    value, depth = read(data), 0
    while value:
        assert value[0] is value[1]  # 2^100 elements if they were copied
        value, depth = value[0], depth + 1
    assert depth == 100


def _storage(count: int) -> Storage:
    data = torch.arange(count, dtype=torch.float32).view(torch.uint8)
    return Storage(FLOAT32, 4 * count, lambda ranges, alignment: [data[start:end] for start, end in ranges])


def _tensor_pickle(shape: object, strides: object, offset: object) -> object:
    """What `_rebuild_tensor_v2` with a storage of 12 floats gives."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return "storage" if obj is storage else None

        def reducer_override(self, obj):
            return (
                (torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, OrderedDict()))
                if obj is tensor
                else NotImplemented
            )

    class Placeholder: ...

    storage, tensor = Placeholder(), Placeholder()
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(tensor)
    return read(file.getvalue(), lambda pid: _storage(12))


def test_tensor_view_within_its_storage_is_read():
    found = _tensor_pickle((2, 3), (1, 2), 4)
    assert isinstance(found, LazyTensor)
    assert found.load().tolist() == [[4, 6, 8], [5, 7, 9]]


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (3, 1), 7),
        ((13,), (1,), 0),
        ((2,), (12,), 0),
        ((2,), (-1,), 5),
        ((2,), (1,), -1),
        ((-2,), (1,), 0),
        ((2, 3), (1,), 0),
        ((2**41,), (0,), 0),
        ((2**20, 2**30), (0, 0), 0),
        ((1,) * 9, (1,) * 9, 0),
        ((2.0,), (1,), 0),
        ((True,), (1,), 0),
        ((2**100,), (1,), 0),
        ("ab", (1,), 0),
        ((2,), None, 0),
        ((2,), (1,), "x"),
    ],
)
def test_tensor_outside_its_storage_is_refused(shape, strides, offset):
    with pytest.raises(MalformedError):
        _tensor_pickle(shape, strides, offset)


def test_tensor_of_no_elements_is_read():
    assert _tensor_pickle((0, 3), (3, 1), 12).load().shape == (0, 3)  # type: ignore[attr-defined]


def test_name_from_a_file_is_shown_without_control_characters():
    assert printable("a\x1b[31m\n\ud800b") == "a?[31m \\ud800b"
    assert len(printable("x" * 1000)) == 101
