"""TensorRT's timing cache as a file: one for each GPU and version, replaced whole, and merged when two builds end at once."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError
from ..files.output import atomic_output, locked
from .library import Library
from .plan_cache import cache_folder

logger = logging.getLogger(__name__)


def choose_timing_file(library: Library, gpu: tuple[str, str] | None, given: Path | None) -> Path | None:
    """The file of one build's timings; None for none.

    Args:
        library: Which TensorRT.
        gpu: Name and compute capability.
        given: That the user names; None: one of this GPU and TensorRT in the cache folder.
    """
    if library.is_rtx:  # it times nothing before it runs
        if given is not None:
            logger.warning("%s keeps no timings: --timing-cache has no effect", library.name)
        return None
    if given is not None or gpu is None:
        return given
    try:
        folder = cache_folder() / "timing"
        folder.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        logger.warning("timings are not kept: %s", error)
        return None
    name = re.sub(r"[^a-z0-9]+", "-", gpu[0].lower()).strip("-")
    return folder / f"{library.flavour}-{library.version}-{name}-sm{gpu[1].replace('.', '')}.timing"


@dataclass(slots=True)
class TimingFile:
    """The timings of one build.

    Attributes:
        path: The file.
        usable: False where the file is of another GPU or TensorRT: then it is neither used nor replaced.
        bytes_before: Its size when the build began; 0 where there was none.
    """

    path: Path
    usable: bool = True
    bytes_before: int = 0

    def load(self, settings: Any) -> None:
        """Gives TensorRT the timings in the file, or none."""
        data = self._read()
        known = settings.create_timing_cache(data) if data else None  # may be None, too, of bytes that are no timings
        if known is not None and settings.set_timing_cache(known, False):
            self.bytes_before = len(data)
            return
        if data:
            self.usable = False
            logger.warning("%s: the timings are damaged, or of another GPU or TensorRT: they are not used, and the file is left as it is", self.path)
        settings.set_timing_cache(settings.create_timing_cache(b""), False)

    def store(self, settings: Any) -> None:
        """Writes what TensorRT has measured, with what another build has written meanwhile. Where that fails it is logged: no plan is lost."""
        measured = settings.get_timing_cache()
        if not self.usable or measured is None:
            return
        try:
            with locked(self.path):
                self._merge(settings, measured)
        except ArtifactError as error:
            logger.warning("the timings are not kept: %s", error.message)

    def _merge(self, settings: Any, measured: Any) -> None:
        latest = self._read()
        known = settings.create_timing_cache(latest) if latest else None
        if latest and (known is None or not measured.combine(known, False)):
            logger.warning("%s: was replaced by what is damaged, or of another GPU or TensorRT, and is left as it is", self.path)
            return
        with atomic_output(self.path, force=True) as output:
            output.partial.write_bytes(bytes(measured.serialize()))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            logger.warning("%s: cannot be read: %s", self.path, error.strerror)
            return b""
