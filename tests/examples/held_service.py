"""The example service; its batches wait while the file TEST_GATE is there, its decoders while TEST_GATE.decode is.

Its grace ends with TEST_GRACE_IS_OVER.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from examples.service import __main__ as program
from examples.service.decoders import Decoders
from repvgg_deploy.runtime.batcher import _Crew
from tests.waiting import Gate

GATE, GRACE_IS_OVER = "TEST_GATE", "TEST_GRACE_IS_OVER"
_A_DAY = 86_400.0


class Clock:
    """In place of the module `time`: once the file is there, a day passes from each look to the next."""

    def __init__(self, over: Path) -> None:
        self._over, self._days = over, 0

    def monotonic(self) -> float:
        self._days += self._over.exists()
        return time.monotonic() + _A_DAY * self._days


def main() -> int:
    gate, answer = Gate(Path(os.environ[GATE])), _Crew._answer

    def answer_when_let(*arguments: Any) -> None:
        gate.pass_through()
        answer(*arguments)

    decoding, decode = Gate(Path(f"{os.environ[GATE]}.decode")), Decoders.decode

    def decode_when_let(*arguments: Any) -> Any:
        decoding.pass_through()
        return decode(*arguments)

    with (
        mock.patch.object(Decoders, "decode", decode_when_let),
        mock.patch.object(_Crew, "_answer", answer_when_let),
        mock.patch.object(program, "time", Clock(Path(os.environ[GRACE_IS_OVER]))),
    ):
        return program.main()


if __name__ == "__main__":
    sys.exit(main())
