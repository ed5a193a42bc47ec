"""The directory of a zip file over its memory map: stored entries are views, deflated ones are bounded, checksums are compared."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import torch

from .lazy_tensor import MalformedError, printable, read_bytes
from .pickle_stream import PickleStream

_LOCAL_HEADER_BYTES = 30
_MAX_ENTRIES = 200_000
_INFLATED_FLOOR = 64 << 20
_INFLATED_RATIO = 20
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, EOFError, RuntimeError, IndexError, OSError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a zip archive.

    Attributes:
        name: With its folder.
        start: Offset of its bytes in the file.
        stored_bytes: As stored.
        nbytes: After inflating.
        deflated: Whether it must be inflated.
        crc: CRC-32 of the inflated bytes; 0 where the writer left it out.
    """

    name: str
    start: int
    stored_bytes: int
    nbytes: int
    deflated: bool
    crc: int


class ZipArchive:
    """The directory of a zip file over its map. `zipfile` reads the directory only; entries are views.

    Args:
        buffer: The mapped file.
        file: The same file, open for reading in binary mode.

    Raises:
        MalformedError: The directory is damaged or missing (a truncated file).
    """

    def __init__(self, buffer: mmap.mmap, file: BinaryIO) -> None:
        self.buffer = buffer
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            if len(infos) > _MAX_ENTRIES:
                raise MalformedError(f"the zip archive has {len(infos)} entries")
            self.entries = {info.filename: self._locate(info) for info in infos}
        except MalformedError:
            raise
        except _ZIP_ERRORS as error:
            raise MalformedError(f"the zip archive is damaged or truncated ({printable(str(error))})") from error
        self._check_sizes()

    def _locate(self, info: zipfile.ZipInfo) -> Entry:
        header = info.header_offset
        if not 0 <= header <= len(self.buffer) - _LOCAL_HEADER_BYTES or self.buffer[header : header + 4] != b"PK\x03\x04":
            raise MalformedError(f"the zip entry {printable(info.filename)} does not stand where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", self.buffer, header + 26)
        start = header + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise MalformedError(f"the zip entry {printable(info.filename)} is encrypted or compressed in an unusual way")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if start + info.compress_size > len(self.buffer) or (not deflated and info.compress_size != info.file_size):
            raise MalformedError(f"the zip entry {printable(info.filename)} reaches past the end of the file")
        return Entry(info.filename, start, info.compress_size, info.file_size, deflated, info.CRC)

    def _check_sizes(self) -> None:
        stored = sum(entry.stored_bytes for entry in self.entries.values())
        inflated = sum(entry.nbytes for entry in self.entries.values() if entry.deflated)
        if stored > len(self.buffer):
            raise MalformedError("the entries of the zip archive overlap")
        if inflated > _INFLATED_FLOOR + _INFLATED_RATIO * len(self.buffer):
            raise MalformedError(f"the zip archive would inflate to {inflated:,} bytes, more than weights can")

    def inflate(self, entry: Entry) -> bytes:
        """The bytes of a deflated entry.

        Raises:
            MalformedError: They are damaged, or of another length than the directory says.
        """
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = decoder.decompress(memoryview(self.buffer)[entry.start : entry.start + entry.stored_bytes], entry.nbytes + 1)
        except zlib.error as error:
            raise MalformedError(f"the zip entry {printable(entry.name)} is damaged ({error})") from error
        if len(data) != entry.nbytes:
            raise MalformedError(f"the zip entry {printable(entry.name)} has another length than the directory says")
        return data

    def stream(self, entry: Entry) -> PickleStream:
        """An entry as a pickle stream."""
        if entry.deflated:
            data = self.inflate(entry)
            return PickleStream(data, 0, len(data))
        return PickleStream(self.buffer, entry.start, entry.start + entry.nbytes)

    def read(self, entry: Entry, alignment: int) -> torch.Tensor:
        """uint8 (n,): the bytes of an entry, compared with their checksum.

        Raises:
            MalformedError: The checksum differs.
        """
        data = bytearray(self.inflate(entry)) if entry.deflated else None
        start = 0 if data is not None else entry.start
        view = memoryview(data if data is not None else self.buffer)[start : start + entry.nbytes]
        # torch can be told to write no checksums (`set_crc32_options(False)`): the field is then not one.
        if entry.crc and zlib.crc32(view) != entry.crc:
            raise MalformedError(f"the checksum of {printable(entry.name)} is wrong: the file was damaged after it was written")
        return read_bytes(self.buffer if data is None else data, start, entry.nbytes, alignment=alignment)
