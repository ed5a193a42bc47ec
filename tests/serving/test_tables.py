"""Tables in parts: whatever kills a run, the next one goes on, and no row is lost or doubled."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import ArtifactError, InputError
from repvgg_deploy.serving.tables import SUFFIXES, Done, GrowingTable, as_text
from tests.kills import killed_before

COLUMNS: dict[str, type | int] = {"image": str, "class_1": int, "score_1": float, "features": 2, "error": str}
RUN = {"model": "a", "top": 1}


def rows(first: int, count: int) -> list[tuple[Any, ...]]:
    """Every third has an error, and no values."""
    made = []
    for index in range(first, first + count):
        name = f'photo, {index}\n"ä"\r.png'
        vector = np.array([index, 0.1], np.float32)
        made.append((name, None, None, None, "no image") if index % 3 == 2 else (name, index, 0.5, vector, None))
    return made


def read(path: Path) -> list[dict[str, Any]]:
    """The rows as they are in every format."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        return [
            {**row, "features": row["features"] and [round(value, 6) for value in row["features"]]}  # float32
            for row in parquet.read_table(path).to_pylist()
        ]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                "image": row["image"],
                "class_1": int(row["class_1"]) if row["class_1"] else None,
                "score_1": float(row["score_1"]) if row["score_1"] else None,
                "features": [float(row["features_0"]), float(row["features_1"])] if row["features_0"] else None,
                "error": row["error"] or None,
            }
            for row in csv.DictReader(file)
        ]


def expected(count: int) -> list[dict[str, Any]]:
    return [
        {**dict(zip(COLUMNS, row, strict=True)), "features": None if row[3] is None else [float(index), 0.1]}
        for index, row in enumerate(rows(0, count))
    ]


def need(suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_table_of_several_parts_is_one_file_with_every_value(tmp_path: Path, suffix: str) -> None:
    need(suffix)
    target = tmp_path / f"table{suffix}"
    with GrowingTable(target, COLUMNS, run=RUN) as table:
        for first in (0, 5, 10):
            table.append(rows(first, 5))
        assert not target.exists()
        assert table.finish() == 15
    assert read(target) == expected(15)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_table_without_rows_has_its_columns(tmp_path: Path, suffix: str) -> None:
    need(suffix)
    target = tmp_path / f"table{suffix}"
    with GrowingTable(target, COLUMNS, run=RUN) as table:
        assert table.finish() == 0
    assert read(target) == []


@pytest.mark.parametrize("suffix", [".csv", *(pytest.param(name, marks=pytest.mark.slow) for name in SUFFIXES[1:])])
def test_table_killed_before_any_change_of_the_file_system_goes_on_to_the_same_file(
    tmp_path: Path, suffix: str
) -> None:
    need(suffix)

    def work(target: Path) -> None:
        with GrowingTable(target, COLUMNS, run=RUN, resume=True) as table:
            done = table.find_done()
            for first in (0, 4):
                waiting = [row for row in rows(first, 4) if row[0] not in done]
                if waiting:
                    table.append(waiting)
            assert table.finish() == 8

    number = 1
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / f"table{suffix}"
        killed = killed_before(number, folder, lambda target=target: work(target))
        if target.exists():
            assert sorted(row["image"] for row in read(target)) == sorted(row["image"] for row in expected(8))
        if not target.exists() or list(folder.iterdir()) != [target]:
            work(target)  # what a person does next
        assert sorted(map(str, read(target))) == sorted(map(str, expected(8)))
        assert [path for path in folder.iterdir() if path.suffix != ".partial"] == [target]
        if not killed:
            break
        number += 1
    assert number > 10


def test_table_with_parts_asks_what_to_do(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    with GrowingTable(target, COLUMNS, run=RUN) as table:
        table.append(rows(0, 3))
    with pytest.raises(ArtifactError, match="an interrupted run left 1 parts"):
        GrowingTable(target, COLUMNS, run=RUN)
    with pytest.raises(InputError, match="the interrupted run had top 1, this one has 5"):
        GrowingTable(target, COLUMNS, run={**RUN, "top": 5}, resume=True)
    with GrowingTable(target, COLUMNS, run={**RUN, "top": 5}, force=True) as table:
        assert len(table.find_done()) == 0
        table.append(rows(0, 1))
        assert table.finish() == 1
    with pytest.raises(ArtifactError, match="is there already"):
        GrowingTable(target, COLUMNS, run=RUN)
    with pytest.raises(ArtifactError, match="is there already"):
        GrowingTable(target, COLUMNS, run=RUN, resume=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere/t.csv", "mkdir -p"), ("folder.csv", "is a folder"), ("pipe.csv", "is a device or pipe")],
)
def test_table_that_could_not_be_put_in_place_is_refused_before_the_work(
    name: str, said: str, force: bool, tmp_path: Path
) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ArtifactError) as caught:
        GrowingTable(tmp_path / name, COLUMNS, run=RUN, force=force)
    assert said in f"{caught.value.message} {caught.value.remedy}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "pipe.csv"]


def test_table_begun_anew_and_interrupted_goes_on_over_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old\n", encoding="utf-8")
    with GrowingTable(target, COLUMNS, run=RUN, force=True) as table:
        table.append(rows(0, 3))
    with GrowingTable(target, COLUMNS, run=RUN, resume=True) as table:
        assert len(table.find_done()) == 3
        table.finish()
    assert read(target) == expected(3)


@pytest.mark.parametrize("how", ["", "resume", "force"])
def test_table_that_another_process_writes_is_refused_and_left_alone(tmp_path: Path, how: str) -> None:
    pytest.importorskip("fcntl", reason="no locks here")
    target = tmp_path / "table.csv"
    with GrowingTable(target, COLUMNS, run=RUN) as table:
        table.append(rows(0, 3))
        with pytest.raises(ArtifactError, match="another process is writing it"):
            GrowingTable(target, COLUMNS, run=RUN, resume=how == "resume", force=how == "force")
        table.append(rows(3, 2))
        assert table.finish() == 5
    assert read(target) == expected(5)
    assert list(tmp_path.iterdir()) == [target]


def test_table_of_another_run_is_refused_in_few_words(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    with GrowingTable(target, COLUMNS, run={**RUN, "labels": ["a label"] * 1000}) as table:
        table.append(rows(0, 1))
    with pytest.raises(InputError, match=r"had labels .*, this one has None") as caught:
        GrowingTable(target, COLUMNS, run=RUN, resume=True)
    assert len(str(caught.value)) < 300


def test_table_with_a_damaged_note_or_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file that ends in"):
        GrowingTable(tmp_path / "table.txt", COLUMNS, run=RUN)
    target = tmp_path / "table.csv"
    with GrowingTable(target, COLUMNS, run=RUN) as table:
        table.append(rows(0, 1))
    (tmp_path / ".table.csv.parts" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        GrowingTable(target, COLUMNS, run=RUN, resume=True)


def test_done_knows_every_name_and_no_other() -> None:
    names = [f"folder/{index}.jpg" for index in range(2000)]
    done = Done(names[::2])
    assert [name in done for name in names] == [index % 2 == 0 for index in range(2000)]
    assert len(done) == 1000
    assert "a" not in Done([])


def test_name_that_is_no_utf8_becomes_text() -> None:
    assert as_text("a\udcff.png") == "a\\xff.png"
    assert "a\udcff.png" in Done(["a\\xff.png"])
