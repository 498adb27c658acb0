"""`sd-train caption edit|stats`: captions changed over a whole dataset, and their tags counted."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.errors import ConfigError

USAGE = """usage: sd-train caption {edit,stats} TARGET [OPTIONS]

  edit   search and replace, add, remove, sort and de-duplicate tags; a preview without --apply; --undo takes it back
  stats  how often each tag occurs, as a table, JSON or CSV

TARGET is a folder of images, a dataset file (.toml, .json) or a metadata file (.json).
sd-train caption edit --help and sd-train caption stats --help list the options."""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` asks for; the exit code.

    Raises:
        UserError: if the options or the dataset are wrong.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "edit":
        from sd_train.prepare.caption_edit import main as edit

        return edit(argv[1:])
    if argv[0] == "stats":
        from sd_train.prepare.caption_stats import main as stats

        return stats(argv[1:])
    raise ConfigError(f"sd-train caption: {argv[0]!r} is neither edit nor stats; sd-train caption --help tells more")
