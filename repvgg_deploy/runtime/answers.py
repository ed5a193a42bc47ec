"""Answers to futures, from a thread that must outlive whatever their callbacks do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from .results import Result

logger = logging.getLogger(__name__)


def answer(future: Future[Result], make: Callable[[], Result]) -> None:
    """Sets what is made, or the error of making it: where there is no memory for a copy, say, others have their answers all the same."""
    try:
        made = make()
    except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
        fail(future, error)
        return
    with _survived():
        future.set_result(made)


def fail(future: Future[Result], error: BaseException) -> None:
    """Sets an error."""
    with _survived():
        future.set_exception(error)


@contextlib.contextmanager
def _survived() -> Iterator[None]:
    """`sys.exit` in a callback would end a thread that all wait for; other errors of callbacks are logged by Future itself."""
    try:
        yield
    except BaseException:
        logger.exception("a callback of a future tried to end the thread that called it")
