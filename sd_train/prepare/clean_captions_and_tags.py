"""`clean_captions_and_tags IN.json OUT.json`: the captions and tags of a metadata file, tidied by rules.

Without --rules these are sd-scripts' rules for anime pictures: in captions every word for a person becomes "girl" or
"girls"; in tags underscores become blanks, ratings go, and so do "shirt" beside "white shirt" and, where several people
are seen, hair and eyes of which there are two kinds. --print_rules shows them all, as a file to change. Old calls that
name the folder of images first are understood.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path

from sd_train.config.textfile import printable
from sd_train.errors import ConfigError, DataError, Problems
from sd_train.prepare.arguments import Parser
from sd_train.prepare.cleaning import Rules, as_toml, clean_text, load_rules
from sd_train.prepare.metadata import Metadata, check_target, read_metadata, write_metadata
from sd_train.prepare.sidecars import Passed, numbered, shown


def main(argv: Sequence[str]) -> int:
    """Clean as `argv` says; 3 if an entry holds something else than text.

    Raises:
        UserError: if the options, the rules or the metadata are wrong.
    """
    if "--print_rules" in argv:
        print(as_toml("anime"))
        return 0
    given = _parser().parse_args(argv)
    source, target = given.in_json, given.out_json
    if given.third is not None:
        print("note: the folder of images is not needed; IN.json and OUT.json are", file=sys.stderr)
        source, target = given.out_json, given.third
    problems = Problems()
    check_target(target, problems)
    problems.raise_if_any(ConfigError)
    rules = load_rules(given.rules)
    if not source.is_file():
        raise DataError(f"{source}: there is no such file; give what merge_captions_to_metadata has written")
    metadata = read_metadata(source)
    changed, passed = _clean(metadata, rules, given.debug)
    for line in passed.lines("without caption and tags"):
        print(line, file=sys.stderr)
    written = write_metadata(target, metadata)
    print(f"{target}: {numbered(changed, 'image')} of {len(metadata):,} cleaned"
          + ("" if written else "; nothing has changed"))  # fmt: skip
    return 3 if passed.broken else 0


def _parser() -> Parser:
    parser = Parser("clean_captions_and_tags", __doc__ or "")
    parser.add_argument("in_json", type=Path, metavar="IN.json", help="metadata to read, .json or .jsonl")
    parser.add_argument(
        "out_json", type=Path, metavar="OUT.json", help="where the result goes; what is there becomes OUT.json.bak"
    )
    # Of old calls with FOLDER IN.json OUT.json.
    parser.add_argument("third", type=Path, nargs="?", help=SUPPRESS)
    parser.add_argument("--rules", type=Path, metavar="FILE.toml", help="rules of your own, before the built-in ones; "
                        'or in place of them, with base = "none"')  # fmt: skip
    parser.add_argument("--print_rules", action="store_true", help="print the built-in rules as such a file, and end")
    parser.add_argument("--debug", action="store_true", help="print each text that changes, before and after")
    return parser


def _clean(metadata: Metadata, rules: Rules, debug: bool) -> tuple[int, Passed]:
    """Clean `metadata` in place; how many images have changed, and what was passed over."""
    changed, passed, wrong = 0, Passed(), list[str]()
    for key, entry in metadata.items():
        names = [name for name in ("caption", "tags") if entry.get(name) is not None]
        if not names:
            passed.missing.append(key)
        before = dict(entry)
        for name in names:
            if not isinstance(entry[name], str):
                wrong.append(f"{key}: {name}")
                continue
            entry[name] = clean_text(name, entry[name], rules)
            if debug and entry[name] != before[name]:
                print(f"{printable(key)}: {name}\n  - {printable(before[name])}\n  + {printable(entry[name])}")
        changed += entry != before
    if wrong:
        passed.broken.append(f"{shown(wrong)}: no text; write it in quotes")
    return changed, passed
