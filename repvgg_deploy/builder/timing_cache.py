"""TensorRT's timing cache as a file: one for each GPU and version, replaced whole, and merged when two builds end at once."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import atomic_output, locked

logger = logging.getLogger(__name__)


def timing_cache_path(folder: Path, flavour: str, version: str, gpu: tuple[str, str]) -> Path:
    """Where the timings of one GPU and one TensorRT stand.

    Args:
        folder: Of all of them.
        flavour: `tensorrt`.
        version: Of TensorRT.
        gpu: Name and compute capability.
    """
    name = re.sub(r"[^a-z0-9]+", "-", gpu[0].lower()).strip("-")
    return folder / f"{flavour}-{version}-{name}-sm{gpu[1].replace('.', '')}.timing"


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
        data = self.path.read_bytes() if self.path.is_file() else b""
        if data and settings.set_timing_cache(settings.create_timing_cache(data), False):
            self.bytes_before = len(data)
            return
        if data:
            self.usable = False
            logger.warning("%s: the timings are of another GPU or TensorRT: they are not used, and the file is left as it is", self.path)
        settings.set_timing_cache(settings.create_timing_cache(b""), False)

    def store(self, settings: Any) -> None:
        """Writes what TensorRT has measured, together with what another build has written meanwhile.

        Raises:
            ArtifactError: The file cannot be written.
        """
        measured = settings.get_timing_cache()
        if not self.usable or measured is None:
            return
        with locked(self.path):
            latest = self.path.read_bytes() if self.path.is_file() else b""
            if latest and not measured.combine(settings.create_timing_cache(latest), False):
                logger.warning("%s: was replaced by timings of another GPU or TensorRT, and is left as it is", self.path)
                return
            with atomic_output(self.path, force=True) as output:
                output.partial.write_bytes(bytes(measured.serialize()))
