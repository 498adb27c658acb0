"""Image files opened with Pillow; size and orientation from the header, without decoding and mostly without Pillow.

The usual PNG, JPEG, WebP and BMP headers are read here, many times as fast as Pillow opens a file. Whatever is
unusual or doubtful about one goes to Pillow, so that sizes and messages are always Pillow's.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from sd_train.errors import ImageError

HEAD = 4096
"""Bytes that hold the whole header of most files."""

OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""For image files; a pipe is not waited for."""

_QUARTER_TURNS = (5, 6, 7, 8)
_MOST_PIXELS = 1 << 26  # Pillow warns of more than 89 million.
_LONGEST_PNG_HEADER = 1 << 20
_PNG_KINDS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_LEAST = {b"PLTE": 0, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"bKGD": 0, b"tIME": 0, b"sBIT": 0,
              b"hIST": 0, b"iDOT": 0, b"caBX": 0}  # fmt: skip
# Text under these names would be taken for something else.
_PNG_NAMES = frozenset({b"", b"exif", b"xmp", b"bbox", b"Raw profile type exif", b"XML:com.adobe.xmp"})
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}

# Most JPEG files are what libjpeg writes without options, or nearly: JFIF, tables for quantization, frame, Huffman
# tables, scan. One look at the whole takes a quarter of the walk from marker to marker.
_plain_jpeg = re.compile(
    rb"\xff\xd8\xff\xe0\0\x10JFIF\0.{9}"
    rb"(?:\xff\xdb\0(?:\x43[\0-\x0f].{64}|\x84[\0-\x0f].{64}[\0-\x0f].{64}))+"
    rb"\xff[\xc0-\xc2]\0(?:\x11\x08(?=.{4}\x03)|\x0b\x08(?=.{4}\x01))(.{4})(?:\x03.{9}|\x01.{3})"
    rb"(?:\xff\xc4(?:\0\x1f.{29}|\0\xb5.{179}|\x01\xa2.{416}))*"
    rb"\xff\xda\0(?:\x0c.{10}|\x08.{6})",
    re.DOTALL,
).match
_lengths = struct.Struct(">HH").unpack_from
_frame = struct.Struct(">BHHB").unpack_from
_png_header = struct.Struct(">IIBBBBBI").unpack_from
_png_chunk = struct.Struct(">I4s").unpack_from
_big = struct.Struct(">I").unpack_from
_riff_chunk = struct.Struct("<4sI").unpack_from
_little = struct.Struct("<I").unpack_from
_bmp_header = struct.Struct("<IIIHHI").unpack_from


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open `path`; what goes wrong while reading it inside the block is a `DataError` that names the file.

    FILE.parquet/ROW is the image in that row of the file.
    """
    try:
        with Image.open(_source(path)) as image:
            yield image
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: the image has more pixels than Pillow reads; scale it down") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: no image that Pillow can read; remove it or save it anew as PNG or JPEG") from None
    except PermissionError:
        raise ImageError(f"{path}: the image cannot be opened (permission denied); check its permissions") from None
    # Pillow's reader of AVIF raises RuntimeError.
    except (OSError, RuntimeError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise ImageError(f"{path}: the image cannot be read ({reason}); remove it or save it anew") from None


def _source(path: Path) -> Path | BytesIO:
    if path.parent.suffix.lower() == ".parquet" and path.parent.is_file():
        from sd_train.data.parquet import image_bytes

        return BytesIO(image_bytes(path))
    return path


def orientation(image: Image.Image) -> int:
    """EXIF orientation of a file just opened, 1 to 8; 1 is upright.

    Only what stands before the pixels counts: Pillow would decode a whole PNG to look behind them.
    """
    # PngImageFile.getexif decodes the file if "exif" is not in its header; the base class's does not.
    tags = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
    value = tags.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as the image is meant to be seen, from the header alone.

    Raises:
        DataError: if the header cannot be read.
    """
    size = None
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        try:
            size = size_in_header(os.read(descriptor, HEAD), descriptor)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        pass  # Pillow's reason is the one to tell.
    return size or size_by_pillow(path)


def size_by_pillow(path: Path) -> tuple[int, int]:
    """What `read_size` gives, whatever the format.

    Raises:
        DataError: if the header cannot be read.
    """
    with open_image(path) as image:
        width, height = image.size
        return (height, width) if orientation(image) in _QUARTER_TURNS else (width, height)


def size_in_header(head: bytes, descriptor: int) -> tuple[int, int] | None:
    """(width, height) as seen, of the open file that begins with `head`; None if only Pillow can tell.

    Raises:
        OSError: if the file cannot be read.
    """
    if plain := _plain_jpeg(head):
        height, width = _lengths(head, plain.start(1))
        return (width, height) if 0 < width * height <= _MOST_PIXELS else None
    try:
        if head.startswith(b"\xff\xd8\xff"):
            found = _jpeg(head, descriptor)
        elif head.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
            found = _png(head, descriptor)
        elif head.startswith(b"RIFF"):
            found = _webp(head, descriptor)
        elif head.startswith(b"BM"):
            found = _bmp(head)
        else:
            return None
    except (struct.error, IndexError):
        return None  # cut short
    if found is None:
        return None
    width, height, turn = found
    if not 0 < width * height <= _MOST_PIXELS:
        return None
    return (height, width) if turn in _QUARTER_TURNS else (width, height)


def _read_at(descriptor: int, place: int, length: int) -> bytes:
    # Windows has no pread.
    os.lseek(descriptor, place, os.SEEK_SET)
    return os.read(descriptor, length)


def _tiff_orientation(tiff: bytes) -> int | None:
    """Orientation in EXIF data; 0 if there is none; None if the data are doubtful.

    https://www.cipa.jp/std/documents/download_e.html?DC-008-Translation-2023-E (Exif 3.0), section 4.6.2
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if start < 8 or len(entries) < 12 * count:
        return None
    found, total = 0, 0
    for tag, kind, number, place in struct.iter_unpack(order + "HHII", entries):
        size = number * _TIFF_UNITS.get(kind, 1 << 32)
        if size > 4:
            total += size
            if place + size > len(tiff) or total > len(tiff):
                return None
        if tag == ExifTags.Base.Orientation:
            if kind != 3 or number != 1 or found:
                return None
            value = place & 0xFFFF if order == "<" else place >> 16
            found = value if 1 <= value <= 8 else 1
    return found


def _jpeg(head: bytes, descriptor: int) -> tuple[int, int, int] | None:
    """(width, height, orientation): the markers up to the start of the scan, ITU-T T.81, annex B."""
    data, base, place = head, 0, 2  # `data` is the file from byte `base` on.
    size: tuple[int, int] | None = None
    turn: int | None = None
    maybe_in_xmp = False
    while True:
        at = place - base
        if at + 4 > len(data):
            data, base, at = _read_at(descriptor, place, HEAD), place, 0
        if data[at] != 0xFF:
            return None
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if length < 2:
            return None
        start = place
        place += 2 + length
        if marker == 0xC4 or marker == 0xDD:  # Huffman tables, restart interval
            continue
        if at + 2 + length > len(data):
            if marker == 0xE2:  # A colour profile is long, and only its beginning matters.
                length = min(length, HEAD - 2)
            data, base, at = _read_at(descriptor, start, 2 + length), start, 0
            if 2 + length > len(data):
                return None
        at, end = at + 4, at + 2 + length
        if marker == 0xDB:
            while at < end:
                at += 65 if data[at] < 16 else 129
            if at != end:
                return None
        elif marker == 0xC0 or marker == 0xC2 or marker == 0xC1:
            bits, height, width, layers = _frame(data, at)
            if bits != 8 or layers not in (1, 3, 4) or length < 8 or (length - 8) % 3 or size is not None:
                return None
            size = width, height
        elif marker == 0xDA:
            return None if size is None or (not turn and maybe_in_xmp) else (*size, turn or 1)
        elif marker == 0xE1:
            if data.startswith(b"Exif\0\0", at):
                if turn is not None or (turn := _tiff_orientation(data[at + 6 : end])) is None:
                    return None
            elif data.find(b"tiff:Orientation", at, end) >= 0:
                maybe_in_xmp = True
        elif not _harmless(marker, data[at:end]):
            return None


def _harmless(marker: int, content: bytes) -> bool:
    """Whether this segment of a JPEG file can neither change what Pillow makes of it nor be refused."""
    if marker == 0xE0:
        return not content.startswith(b"JFIF") or len(content) >= 12
    if marker == 0xE2:  # Multi-picture files have their own reader; a colour profile has a number in byte 13.
        return not content.startswith((b"MPF", b"FPXR")) and len(content) >= 14
    if marker == 0xED:  # Pillow fails where a resource of Photoshop's ends behind its code.
        return content[-6:-2] != b"8BIM"
    if marker == 0xEE:
        return len(content) >= 12
    return marker == 0xFE or 0xE3 <= marker <= 0xEF


def _png(head: bytes, descriptor: int) -> tuple[int, int, int] | None:
    """(width, height, orientation): the chunks before the pixels, https://www.w3.org/TR/png-3/#5DataRep."""
    width, height, depth, colour, _, category, _, check = _png_header(head, 16)
    if depth not in _PNG_KINDS.get(colour, ()) or category or zlib.crc32(head[12:29]) != check:
        return None
    place, turn, maybe_in_xmp = 33, None, False
    while True:
        if place + 8 > len(head):
            head = _more(head, descriptor)
        length, name = _png_chunk(head, place)
        if name == b"IDAT":
            return None if not turn and maybe_in_xmp else (width, height, turn or 1)
        start, end = place + 8, place + 8 + length
        if end + 4 > len(head):
            head = _more(head, descriptor)
        if zlib.crc32(head[place + 4 : end]) != _big(head, end)[0]:
            return None
        place = end + 4
        if name == b"eXIf":
            if turn is not None or (turn := _tiff_orientation(head[start:end])) is None:
                return None
        elif name == b"iTXt" and head.startswith(b"XML:com.adobe.xmp\0\0", start):
            maybe_in_xmp |= head.find(b"tiff:Orientation", start, end) >= 0
        elif name == b"tRNS":
            if length < {0: 2, 2: 6}.get(colour, 0):
                return None
        elif name in (b"tEXt", b"iTXt"):
            keyword, separator, rest = head[start:end].partition(b"\0")
            if keyword in _PNG_NAMES or not separator or (name == b"iTXt" and not rest.startswith(b"\0")):
                return None
        elif name == b"iCCP":
            if not _plain_profile(head[start:end]):
                return None
        elif length < _PNG_LEAST.get(name, 1 << 32):
            return None


def _more(head: bytes, descriptor: int) -> bytes:
    return head if len(head) > HEAD else _read_at(descriptor, 0, _LONGEST_PNG_HEADER)


def _plain_profile(content: bytes) -> bool:
    """Whether Pillow takes this colour profile of a PNG file: deflated, and no more than 1 MiB."""
    _, separator, rest = content.partition(b"\0")
    if not separator or not rest.startswith(b"\0"):
        return False
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(rest[1:], 1 << 20)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail


def _webp(head: bytes, descriptor: int) -> tuple[int, int, int] | None:
    """(width, height, orientation) of a still picture: https://developers.google.com/speed/webp/docs/riff_container."""
    size, kind = _little(head, 4)[0] + 8, head[12:16]
    if head[8:12] != b"WEBP" or size % 2 or size > os.fstat(descriptor).st_size:
        return None
    if kind != b"VP8X":
        length = _little(head, 16)[0]
        found = _webp_frame(kind, length, head[20:30])
        # Nothing may follow the picture.
        return (*found, 1) if found and 20 + length + length % 2 == size else None
    (length, flags) = _riff_chunk(head, 12)[1], head[20]
    if length != 10 or flags & 0x02 or flags & 0xC1 or any(head[21:24]):
        return None
    width = 1 + int.from_bytes(head[24:27], "little")
    height = 1 + int.from_bytes(head[27:30], "little")
    place, turn, maybe_in_xmp, frame = 30, None, False, None
    while place < size:
        here = head[place : place + 18] if place + 18 <= len(head) else _read_at(descriptor, place, 18)
        name, length = _riff_chunk(here, 0)
        if place + 8 + length > size:
            return None
        if name in (b"VP8 ", b"VP8L"):
            if frame is not None or (frame := _webp_frame(name, length, here[8:])) != (width, height):
                return None
        elif name == b"EXIF" and flags & 0x08:
            data = _read_at(descriptor, place + 8, length)
            if turn is not None or (turn := _tiff_orientation(data.removeprefix(b"Exif\0\0"))) is None:
                return None
        elif name == b"XMP " and flags & 0x04:
            maybe_in_xmp |= b"tiff:Orientation" in _read_at(descriptor, place + 8, length)
        elif name not in (b"ALPH", b"ICCP") or frame is not None:
            return None
        place += 8 + length + length % 2
    return None if frame is None or (not turn and maybe_in_xmp) else (width, height, turn or 1)


def _webp_frame(kind: bytes, length: int, start: bytes) -> tuple[int, int] | None:
    """Size in the first ten bytes of a picture's data: RFC 6386, section 9.1, and RFC 9649, section 3.4."""
    if kind == b"VP8 ":
        tag = int.from_bytes(start[:3], "little")
        # A key frame that is shown, of a known profile, with its first partition inside.
        if length < 10 or tag & 1 or (tag >> 1 & 7) > 3 or not tag >> 4 & 1 or tag >> 5 >= length:
            return None
        if start[3:6] != b"\x9d\x01\x2a":
            return None
        return int.from_bytes(start[6:8], "little") & 0x3FFF, int.from_bytes(start[8:10], "little") & 0x3FFF
    if kind != b"VP8L" or length < 5 or start[0] != 0x2F:
        return None
    (bits,) = _little(start, 1)
    return None if bits >> 29 else (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))


def _bmp(head: bytes) -> tuple[int, int, int] | None:
    """(width, height, 1) of plain true colour, which has no palette that could be wrong."""
    length, width, height, _, depth, compression = _bmp_header(head, 14)
    if length not in (40, 108, 124) or len(head) < 14 + length or depth not in (24, 32) or compression:
        return None
    return width, (1 << 32) - height if head[25] == 0xFF else height, 1
