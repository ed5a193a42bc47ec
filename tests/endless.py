"""A program whose work does not end by itself: so that a signal meets it at work, however late the test sends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
_CODE = """
import importlib, operator, pathlib, runpy, sys
marker, module, name, before, program = sys.argv[1:6]
sys.argv[:] = [program, *sys.argv[6:]]
*path, last = name.split(".")
owner = importlib.import_module(module)
if path:
    owner = operator.attrgetter(".".join(path))(owner)
real, calls = getattr(owner, last), 0

def endless(*args, **named):
    global calls
    calls += 1
    if calls > int(before):
        pathlib.Path(marker).touch()
        while True:
            real(*args, **named)
    return real(*args, **named)

setattr(owner, last, endless)
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Stage:
    """A function of the package that is called again and again.

    Attributes:
        module: Where it is looked up.
        name: Its name there.
        before: How many calls of it end as ever before.
    """

    module: str
    name: str
    before: int = 0


def start_endless(
    program: str, arguments: Sequence[object], stage: Stage, marker: Path, environment: dict[str, str] | None = None
) -> Any:
    """The process of a module or script that has reached a stage, and works at it for ever.

    Args:
        program: Name of the module, or path of the script.
        arguments: Of the program.
        stage: Where it stays.
        marker: A file that must not exist; the process makes it when the stage is reached.
        environment: None takes this process's own.
    """
    stay = [str(marker), stage.module, stage.name, str(stage.before)]
    command = [sys.executable, "-c", _CODE, *stay, program, *map(str, arguments)]
    given = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    wait_until(lambda: marker.exists() or process.poll() is not None, f"{stage.name} to be reached")
    assert process.poll() is None, process.communicate()
    return process
