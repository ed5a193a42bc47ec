"""Images → full batches of pixels, decoded ahead of what consumes them, in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import InputError
from ..specs.values import Preprocessing
from .decode import Picture, load_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive images.

    Attributes:
        pictures: Each as it was given, in order, with what is wrong with it where it cannot be read.
        pixels: uint8 (N, H, W, 3), RGB, 0–255, of those that can be read; N may be 0 in the last piece.
    """

    pictures: tuple[tuple[Picture, InputError | None], ...]
    pixels: NDArray[np.uint8]


def decode_ahead(
    pictures: Iterable[Picture], preprocessing: Preprocessing, *, batch_size: int, threads: int | None = None
) -> Iterator[Piece]:
    """Decodes images in threads, up to two batches ahead of the caller; memory does not grow with their number.

    Args:
        pictures: Taken one by one, as they are needed.
        preprocessing: Sizes and filter.
        batch_size: Images of a full batch: every piece but the last has as many that can be read.
        threads: That decode; None: one for each core that this process may use.

    Yields:
        Pieces in the order of `pictures`.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    if isinstance(pictures, (list, tuple)) and len(pictures) == 1:  # threads would cost more than they save
        yield decode_pictures(pictures, preprocessing)
        return
    source = iter(pictures)
    count = threads if threads is not None else count_cores()
    waiting: deque[tuple[Picture, Future[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="repvgg-decode") as pool:
        try:
            while True:
                for picture in islice(source, 2 * batch_size + count - len(waiting)):
                    waiting.append((picture, pool.submit(load_picture, picture, preprocessing)))
                if not waiting:
                    return
                pixels = np.empty((batch_size, *preprocessing.crop, 3), np.uint8)
                taken: list[tuple[Picture, InputError | None]] = []
                filled = 0
                while filled < batch_size and waiting:
                    picture, future = waiting.popleft()
                    try:
                        pixels[filled] = future.result()
                    except InputError as error:
                        taken.append((picture, error))
                    else:
                        taken.append((picture, None))
                        filled += 1
                    for following in islice(source, 1):
                        waiting.append((following, pool.submit(load_picture, following, preprocessing)))
                yield Piece(tuple(taken), pixels[:filled])
        finally:
            for _, future in waiting:
                future.cancel()


def decode_pictures(pictures: Iterable[Picture], preprocessing: Preprocessing) -> Piece:
    """Decodes images one after the other, into one piece."""
    import numpy as np

    found: list[tuple[Picture, InputError | None]] = []
    pixels = []
    for picture in pictures:
        try:
            pixels.append(load_picture(picture, preprocessing))
        except InputError as error:
            found.append((picture, error))
        else:
            found.append((picture, None))
    return Piece(tuple(found), np.stack(pixels) if pixels else np.empty((0, *preprocessing.crop, 3), np.uint8))


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
