"""No file costs more than its size allows: memory is measured in processes of their own, work is counted."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint import containers, pickle
from repvgg_deploy.model.checkpoint.lazy import MalformedError
from repvgg_deploy.model.checkpoint.load import load_checkpoint
from tests.model.checkpoint.crafted import CONTAINERS, LAYOUTS, hostile_pickles, tiny_state, write_pickle, write_views

ROOT = Path(__file__).resolve().parents[3]
SLACK_BYTES = 100_000_000
STRIDES = (2, 2, 2, 2, 2)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def measure(paths: list[Path]) -> dict[str, tuple[str, int]]:
    program = [sys.executable, "-m", "tests.model.checkpoint.crafted", *map(str, paths)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, int]] = {
        Path(path).name: tuple(value) for path, value in json.loads(done.stdout).items()
    }
    return found


@needs_linux
def test_views_of_one_storage_take_no_more_than_file_and_ranges(tmp_path: Path) -> None:
    held = sum(tensor.nbytes for tensor in tiny_state().values())
    for container in CONTAINERS:
        for layout in LAYOUTS if container == "deflated" else LAYOUTS[2:]:
            write_views(tmp_path / f"{container} {layout}", container, layout)
    write_views(tmp_path / "deflated half", "deflated", "contiguous", torch.float16)
    paths = sorted(tmp_path.iterdir())
    for name, (ended, peak) in measure(paths).items():
        reach = held if "contiguous" in name or "half" in name else 24 << 20  # from a tensor's first byte to its last
        assert ended == "loaded", name
        assert peak <= 2 * ((tmp_path / name).stat().st_size + reach) + SLACK_BYTES, name


def test_hostile_pickles_take_no_more_than_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "_ALLOWED_FLOOR", pickle._ALLOWED_FLOOR // 50)
    refused = 0
    for name, body in hostile_pickles(50).items():
        tracemalloc.start()
        try:
            pickle.read_pickle(pickle.PickleStream(body, 0, len(body)))
        except MalformedError:
            refused += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * (pickle._ALLOWED_FLOOR + 2 * len(body)), name
    assert refused >= 9


@needs_linux
@pytest.mark.slow
def test_hostile_pickles_are_refused_within_a_budget_of_memory(tmp_path: Path) -> None:
    for name, body in hostile_pickles().items():
        write_pickle(tmp_path / name, body)
    for name, (ended, peak) in measure(sorted(tmp_path.iterdir())).items():
        assert not ended.startswith(("loaded", "escaped", "died")), (name, ended)  # refused, or named as no checkpoint
        assert peak <= 2 * (tmp_path / name).stat().st_size + 2 * SLACK_BYTES, (name, peak)


@needs_linux
def test_headers_of_safetensors_take_no_more_than_the_files_size_allows(tmp_path: Path) -> None:
    data = save({name: tensor.contiguous() for name, tensor in tiny_state().items()})
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    nothing = {"dtype": "F32", "data_offsets": [len(body), len(body)]}
    headers: dict[str, tuple[str, dict[str, object]]] = {
        "texts": ("says far more", {"__metadata__": {f"{index:x}": "" for index in range(750_000)}}),
        "fewer texts": ("loaded", {"__metadata__": {f"{index:x}": "" for index in range(120_000)}}),
        "long text": ("says far more", {"__metadata__": {"a": "b" * (9 << 20)}}),
        "tensors": ("says far more", {f"e{index}": {**nothing, "shape": [0]} for index in range(90_000)}),
        "sizes": ("says far more", {"e": {**nothing, "shape": [1] * 3_000_000 + [0]}}),
    }
    for name, (_, more) in headers.items():
        text = json.dumps({**header, **more}, separators=(",", ":")).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + body)
    for name, (ended, peak) in measure(sorted(tmp_path.iterdir())).items():
        assert headers[name][0] in ended, name
        assert peak <= 2 * (tmp_path / name).stat().st_size + SLACK_BYTES, name


@pytest.mark.parametrize(
    ("container", "layout"),
    [(kind, "overlapping") for kind in CONTAINERS] + [("deflated", layout) for layout in LAYOUTS[:2]],
)
def test_views_of_one_storage_keep_their_values(container: str, layout: str, tmp_path: Path) -> None:
    write_views(tmp_path / "m.pth", container, layout)
    state = load_checkpoint(tmp_path / "m.pth", strides=STRIDES).state
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_state().items())


def test_deflated_storage_is_inflated_once_and_to_no_more_than_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    inflate = containers._inflate

    def count(stored: memoryview, size: int, name: str) -> Iterator[bytes]:
        for piece in inflate(stored, size, name):
            counts[name] += len(piece)
            yield piece

    monkeypatch.setattr(containers, "_inflate", count)
    write_views(tmp_path / "m.pth", "deflated", "overlapping")
    load_checkpoint(tmp_path / "m.pth", strides=STRIDES)
    assert counts["archive/data/0"] == 24 << 20


def test_views_that_pose_as_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    """One range of a large storage, which every tensor views: the storage's size is no excuse."""
    big = torch.zeros(1 << 20)
    state = {name: big[: tensor.numel()].view(tensor.shape) for name, tensor in tiny_state().items()}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="share memory"):
        load_checkpoint(tmp_path / "m.pth", strides=STRIDES)
