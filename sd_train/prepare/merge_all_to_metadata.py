"""`merge_all_to_metadata FOLDER OUT.json`: captions and tags from beside the images into a metadata file."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.prepare.cleaning import clean_text, load_rules
from sd_train.prepare.merge import Source, merge, merge_parser


def main(argv: Sequence[str]) -> int:
    """Merge as `argv` says; 3 if a text file could not be read.

    Raises:
        UserError: if the options, the folder or the metadata are wrong.
    """
    extensions = {"caption_extension": ".caption", "tags_extension": ".txt"}
    parser = merge_parser("merge_all_to_metadata", __doc__ or "", extensions)
    parser.add_argument(
        "--clean_caption", action="store_true", help="also do what clean_captions_and_tags does without options"
    )
    given = parser.parse_args(argv)
    sources = [Source("caption", given.caption_extension), Source("tags", given.tags_extension)]
    rules = load_rules(None) if given.clean_caption else None
    return merge(given, sources, None if rules is None else lambda name, text: clean_text(name, text, rules))
