"""Runs the blocks of a document one after the other in this process, as a reader would: torch is loaded once.

    python -m tests.contract.run_document < blocks.json

Standard input is a JSON list of [language, code]. Of `sh`, our own programs run here; any other line goes to `sh`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shlex
import subprocess
import sys

PROGRAMS = {"repvgg-export": "repvgg_deploy.cli.export", "repvgg-trt": "repvgg_deploy.cli.trt"}


def run_shell(code: str) -> None:
    """Each command must end with exit code 0."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in PROGRAMS and not set("|<>&*$") & set(line):
            status = importlib.import_module(PROGRAMS[words[0]]).main(words[1:])
        else:
            status = subprocess.run(["sh", "-euc", line], check=False).returncode if words else 0
        assert status == 0, f"exit code {status}: {line}"


for language, code in json.load(sys.stdin):
    sys.stderr.write(f"--- {language}\n{code}\n")
    if language == "sh":
        with contextlib.redirect_stdout(sys.stderr):
            run_shell(code)
    else:
        exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})
