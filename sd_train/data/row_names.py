"""What the rows of encoded pictures are called on disk: by all that determines them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sd_train.data.buckets import crop_box
from sd_train.data.content import DIGEST_BYTES, ContentHashes
from sd_train.data.index import ImageIndex
from sd_train.data.settings import SubsetConfig
from sd_train.data.shards import Keys

FORMAT = 1
"""Goes up when a row comes to hold something else for the same image and options."""

_pack = struct.Struct(f"<{DIGEST_BYTES}s{DIGEST_BYTES}s8i2?").pack
"""Contents of image and mask; size, resized size, bucket, crop; mirrored, from an .npz file."""

_NOTHING = bytes(DIGEST_BYTES)


class RowNames:
    """Names for the rows that one encoder gives."""

    def __init__(self, encoder: str, hashes: ContentHashes) -> None:
        self.encoder, self.hashes = encoder, hashes

    def keys(self, index: ImageIndex, places: NDArray[np.int64], contents: Sequence[bytes], npz: bool) -> Keys:
        """[n, 2]: what the rows of images `places` are called, as they are and mirrored.

        `contents`: digests of the images, or of the .npz files that stand for them.

        Raises:
            DataError: if a mask cannot be read.
        """
        starts = [hashlib.blake2b(self._options(subset), digest_size=16) for subset in index.dataset.subsets]
        masks = self._masks(index, places)
        keys = []
        for place, subset, content, size, resized, number in zip(
            places.tolist(),
            index.subset_of[places].tolist(),
            contents,
            index.sizes[places].tolist(),
            index.resized[places].tolist(),
            index.bucket_of[places].tolist(),
            strict=True,
        ):
            bucket = index.buckets[number]
            # Caches hold the centre of each image.
            crop = crop_box((resized[0], resized[1]), bucket)
            mask = masks.get(place, _NOTHING)
            for mirrored in (False, True):
                digest = starts[subset].copy()
                digest.update(_pack(content, mask, *size, *resized, *bucket, *crop, mirrored, npz))
                keys.append(digest.digest())
        return np.frombuffer(b"".join(keys), "S16").reshape(-1, 2)

    def _masks(self, index: ImageIndex, places: NDArray[np.int64]) -> dict[int, bytes]:
        """What the mask files of those images that have one hold."""
        if index.masks is None:
            return {}
        paths = {place: mask for place in places.tolist() if (mask := index.record(place).mask) is not None}
        return dict(zip(paths, self.hashes.of_files(list(paths.values())), strict=True))

    def _options(self, subset: SubsetConfig) -> bytes:
        masks = (subset.alpha_mask, subset.unmasked_weight) if subset.masked else None
        return f"latents {FORMAT} {self.encoder} {subset.resize_interpolation} {masks}\n".encode()
