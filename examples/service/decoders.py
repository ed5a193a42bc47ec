"""Decodes images in processes of their own, so that an image that costs too much time or memory ends with its process.

No decoder can be interrupted in a thread, and the Python parts of Pillow's hold up all other threads: 32 MB of padding
between the segments of a JPEG kept one busy for 20 s.

    python -m examples.service.decoders HANDLE PREPROCESSING LIMITS      (what `Decoders` starts)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from repvgg_deploy.errors import EngineBusyError, InputError, ModelError
from repvgg_deploy.images.decode import decode_image
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import Preprocessing

logger = logging.getLogger(__name__)
FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: what some cameras call their JPEG
_DONE, _REFUSED = b"=", b"!"
_BASE_BYTES, _BYTES_OF_A_PIXEL = 128 << 20, 24
_DEAR = "save it again as a plain JPEG or PNG, smaller or without its metadata"


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one image may take.

    Attributes:
        seconds: Of a processor, so that a busy machine refuses no image that an idle one takes.
        pixels: The largest image that is decoded.
        file_bytes: The largest file.
    """

    seconds: float
    pixels: int
    file_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Of a process that decodes: what it has imported, the file, and the pixels in each form that they go through.

        The dearest image found, a PNG of 16-bit grey, takes 20 bytes a pixel.
        """
        return _BASE_BYTES + _BYTES_OF_A_PIXEL * self.pixels + 2 * self.file_bytes


class Decoders:
    """Processes that decode, each started when it is first needed; for as many threads at once as there are processes.

    Args:
        count: How many.
        preprocessing: How an image becomes an input.
        limits: What one image may take.
    """

    def __init__(self, count: int, preprocessing: Preprocessing, limits: DecodeLimits) -> None:
        self._preprocessing, self._limits = preprocessing, limits
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        self._lock, self._closed, self._running = threading.Lock(), False, set[_Process]()
        for _ in range(count):
            self._idle.put(None)

    def decode(self, data: bytes | bytearray) -> NDArray[np.uint8]:
        """One image file as pixels, uint8 (H, W, 3) RGB, as `decode_image` gives them.

        Raises:
            InputError: As `decode_image`; or it takes more time or memory than an image may.
            EngineBusyError: `close` was called.
            ModelError: No process can be started.
        """
        process, answer = self._idle.get(), None
        try:
            for last in (False, True):
                process = process or self._start()
                answer = process.ask(data)
                if answer is not None:
                    break
                ended, process = process, None
                self._end(ended)
                # What somebody else killed, while it was idle or not, is no fault of the image: once more.
                if last or ended.wait() == -signal.SIGPROF:
                    raise InputError(self._say_end(ended.wait()), remedy=_DEAR)
        finally:
            self._idle.put(process)
        assert answer is not None
        if answer[:1] == _REFUSED:
            message, remedy = json.loads(answer[1:])
            raise InputError(message, remedy=remedy)
        return np.frombuffer(answer, np.uint8, offset=1).reshape(*self._preprocessing.crop, 3)

    def end(self) -> None:
        """Ends all processes, whatever they decode, and waits for none."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def close(self) -> None:
        """Ends all processes, whatever they decode."""
        self.end()
        for process in list(self._running):
            process.wait()

    def _say_end(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"the image that was sent takes more than {self._limits.seconds:g} s to decode"
        return f"the image that was sent ends its decoder ({code})"

    def _start(self) -> _Process:
        with self._lock:
            self._require_open()
            process = _Process(self._preprocessing, self._limits)
            self._running.add(process)
        if process.receive() is None:
            self._end(process)
            raise ModelError("a decoder could not be started", remedy="look at what it printed, and at the memory")
        return process

    def _end(self, process: _Process) -> None:
        process.kill()
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            self._require_open()
        logger.warning("a decoder ended (%d) and is started again with the next image", code)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineBusyError("this server is going away", remedy="ask another server")


class _Process:
    """One process, and the connection to it. It ends when that is closed, also where this process was killed."""

    def __init__(self, preprocessing: Preprocessing, limits: DecodeLimits) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            handle = theirs.fileno()
            # One thread: nothing in it uses more, and the stacks of others count as its memory.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(handle), codec.dumps(preprocessing), codec.dumps(limits)],
                pass_fds=[handle],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )

    def wait(self) -> int:
        """Its exit code once it has ended; minus the signal that ended it."""
        return self._process.wait()

    def ask(self, data: bytes | bytearray) -> bytes | None:
        """What it answers; None where it ended."""
        try:
            self._connection.send_bytes(data)
        except OSError:
            return None
        return self.receive()

    def receive(self) -> bytes | None:
        """Its next message; None where it ended."""
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()


def main() -> int:
    """Decodes what is sent, until the connection is closed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or an init system sends to all of a group
        signal.signal(number, signal.SIG_IGN)
    preprocessing, limits = codec.loads(Preprocessing, sys.argv[2]), codec.loads(DecodeLimits, sys.argv[3])
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes,) * 2)
    PIL.Image.init()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):  # the service has ended
        connection.send_bytes(_DONE)
        while True:
            data = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # nothing hears its signal: the process ends
            answer = _answer(data, preprocessing, limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(answer)
    return 0


def _answer(data: bytes, preprocessing: Preprocessing, limits: DecodeLimits) -> bytes:
    try:
        return _DONE + decode_image(data, preprocessing, formats=FORMATS, max_pixels=limits.pixels).tobytes()
    except (InputError, MemoryError) as error:
        said = "the image that was sent takes more memory than an image may", _DEAR
        if isinstance(error, InputError) and not isinstance(error.__cause__, MemoryError):
            said = error.message, error.remedy
    return _REFUSED + json.dumps(said).encode()


if __name__ == "__main__":
    sys.exit(main())
