"""Image files opened with Pillow: size and orientation from the header, without decoding."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from sd_train.errors import DataError

_QUARTER_TURNS = (5, 6, 7, 8)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open `path`; what goes wrong while reading it inside the block is a `DataError` that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError:
        raise DataError(f"{path}: the image has more pixels than Pillow reads; scale it down") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: no image that Pillow can read; remove it or save it anew as PNG or JPEG") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise DataError(f"{path}: the image cannot be read ({reason}); remove it or save it anew") from None


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
    with open_image(path) as image:
        width, height = image.size
        return (height, width) if orientation(image) in _QUARTER_TURNS else (width, height)
