"""kill -9 before each change of the file system, in a child that is forked; a test judges what stands then."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def killed_before(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that is killed before its change of that number below a folder; whether it had so many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: pytest may have threads
        child = os.fork()
    if not child:
        try:
            _arm(number, str(folder))
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing of the child may reach pytest
            traceback.print_exc()
            os._exit(3)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _arm(number: int, folder: str) -> None:
    left = number

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            counts = bool(arguments[2] & _WRITES)
        else:
            counts = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.link", "os.symlink")
        below = any(os.fsdecode(a).startswith(folder) for a in arguments if isinstance(a, (str, bytes, os.PathLike)))
        if (counts and below) or (event == "ctypes.dlsym" and arguments[1] == "renameat2"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
