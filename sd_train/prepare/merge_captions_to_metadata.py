"""`merge_captions_to_metadata FOLDER OUT.json`: captions from beside the images into a metadata file."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.prepare.merge import Source, merge, merge_parser


def main(argv: Sequence[str]) -> int:
    """Merge as `argv` says; 3 if a caption file could not be read.

    Raises:
        UserError: if the options, the folder or the metadata are wrong.
    """
    parser = merge_parser("merge_captions_to_metadata", __doc__ or "", {"caption_extension": ".caption"})
    given = parser.parse_args(argv)
    return merge(given, [Source("caption", given.caption_extension)])
