"""Text of a file never reaches a terminal, a log or a file of labels with what controls or turns it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from PIL import Image

from examples.service.__main__ import _CleanFormatter
from repvgg_deploy.cli import export as export_program
from repvgg_deploy.cli.trt import main
from repvgg_deploy.errors import clean_text
from repvgg_deploy.files import wire
from repvgg_deploy.specs.values import METADATA_KEY, HistoryEntry
from tests.runtime.make_model import make_metadata, make_onnx, write_bound

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066x\u200b\ufeff\x00b"
FORBIDDEN = "\x1b\x07\x9b\x00\u202e\u2066\u200b\ufeff"
HELD = "a?]0;owned"


def make_hostile(path: Path) -> Path:
    """A sound model whose every name and note is hostile."""
    made = ModelProto.FromString(make_onnx(path).read_bytes())
    del made.metadata_props[:]
    for node in made.graph.node:
        node.name = f"{HOSTILE}{node.name}"
    plain = make_metadata()
    assert plain.variant is not None and plain.source is not None
    history = HistoryEntry(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})
    check = dataclasses.replace(plain.certificate.checks[0], name=HOSTILE)
    metadata = dataclasses.replace(
        plain,
        spec=dataclasses.replace(plain.spec, labels=tuple(f"{HOSTILE}{index}" for index in range(7))),
        variant=dataclasses.replace(plain.variant, name=HOSTILE),
        source=dataclasses.replace(plain.source, file=HOSTILE, family=HOSTILE),
        certificate=dataclasses.replace(
            plain.certificate, reference=HOSTILE, checks=(check,), versions={HOSTILE: HOSTILE}, facts=(HOSTILE,)
        ),
        history=(history,),
        notes=(HOSTILE,),
    )
    return write_bound(path, made.SerializeToString(), metadata)


def make_foreign(path: Path) -> Path:
    """An ONNX of others with hostile names, of which two inputs are asked about."""
    values = [helper.make_tensor_value_info(HOSTILE + name, TensorProto.FLOAT, [1, 3]) for name in "xyz"]
    node = helper.make_node("Add", [HOSTILE + "x", HOSTILE + "y"], [HOSTILE + "z"], name=HOSTILE)
    graph = helper.make_graph([node], HOSTILE, values[:2], values[2:])
    onnx.save(helper.make_model(graph, producer_name=HOSTILE), path)
    return path


def make_checkpoint(path: Path) -> Path:
    """A state dict of nothing known, under hostile names."""
    torch.save({HOSTILE: {HOSTILE + "w": torch.zeros(2)}, METADATA_KEY: {HOSTILE: HOSTILE}}, path)
    return path


def test_no_program_prints_or_writes_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, foreign = make_hostile(tmp_path / "m.onnx"), make_foreign(tmp_path / "f.onnx")
    image = tmp_path / "i.png"
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(image)
    checkpoint, repository, held = make_checkpoint(tmp_path / "c.pth"), tmp_path / "repository", 0
    (tmp_path / "cut.onnx").write_bytes(model.read_bytes()[:-3] + wire.bytes_field(14, b"\x0a\x02\x1b["))
    np.savez(tmp_path / "a.npz", **{HOSTILE: np.zeros(2)})
    commands = [
        ["inspect", "--full", model],
        ["infer", model, image, "-v"],
        ["triton", model, "--out", repository],
        ["compare", model, model, "--data", image],
        ["eval", model, "--data", tmp_path / "a.npz"],
        ["quantize", model, "--int8", "--calib", tmp_path / "a.npz"],
        ["quantize", model, "--fp16", "-v"],
        ["inspect", "--full", foreign],
        ["fold", foreign, "--describe"],
        ["inspect", tmp_path / "cut.onnx"],
    ]
    for command in commands:
        main([str(word) for word in command])
        said = capsys.readouterr()
        assert not set(said.out + said.err) & set(FORBIDDEN), command
        held += HELD in said.out + said.err
    for options in (["--describe"], ["--out", tmp_path / "o.onnx"]):
        export_program.main(["--ckpt", str(checkpoint), *map(str, options)])
        said = capsys.readouterr()
        assert not set(said.out + said.err) & set(FORBIDDEN), options
        held += HELD in said.out + said.err
    assert held >= 6  # the hostile text was there to be shown
    written = [file.read_text("utf-8") for file in repository.rglob("*.*txt")]
    assert len(written) == 2 and not set("".join(written)) & set(FORBIDDEN)
    assert written[0].count(HELD) + written[1].count(HELD) >= 7


def test_log_of_the_service_is_clean() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "model %s", (HOSTILE,), None)
    assert not set(_CleanFormatter("%(message)s").format(record)) & set(FORBIDDEN)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Käse 치즈 می‌خواهم 👩‍🔬 שלום", "Käse 치즈 می‌خواهم 👩‍🔬 שלום"),
        ("a\x1b[31mb\x7f\x85c", "a?[31mb? c"),
        ("user\u202etxt.exe\u200f", "user?txt.exe?"),
        ("pay\u200dpal\u200b\u00ad\ufeff", "paypal"),
        ("one\ntwo\tthree\u2028four", "one two three four"),
        ("\ud83d half", r"\ud83d half"),
    ],
)
def test_clean_text_keeps_what_is_read_and_nothing_that_acts(text: str, shown: str) -> None:
    assert clean_text(text) == shown
    assert clean_text(clean_text(text)) == shown


def test_clean_text_of_several_lines_keeps_them() -> None:
    assert clean_text("a\x1b\n  b\tc\r", lines=True) == "a?\n  b\tc "
