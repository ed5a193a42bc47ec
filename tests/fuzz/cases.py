"""The cases of a fuzz test, run in a process of their own: `REPVGG_FUZZ_CASES` sets their number (CI: 2000 or more)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES = int(os.environ.get("REPVGG_FUZZ_CASES", "300"))
ROOT = Path(__file__).resolve().parents[2]


def run_cases(module: str, *arguments: object) -> dict[str, Any]:
    """What `python -m tests.fuzz.MODULE ARGUMENTS` prints as JSON; it dies with none of the cases."""
    program = [sys.executable, "-m", f"tests.fuzz.{module}", *map(str, arguments)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600 + CASES, check=False)
    assert done.returncode == 0, f"the process died; standard error ends with {done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result
