"""The rules that captions and tags are cleaned by, as data: those for anime pictures that sd-scripts cleans by.

The table has the shape of the TOML file that `--rules` reads, and `--print_rules` prints it as one. Where sd-scripts
replaces parts of words ("woman" in "superwoman") these replace whole words, upper or lower case; where it cuts off
everything behind a rating these remove the rating alone.
"""

from __future__ import annotations

from typing import Any

WORDS_FOR_PEOPLE = [
    # From longest to shortest, so that a drawing's style goes with its person.
    ["anime anime", "anime"],
    ["young", ""],
    ["anime girl", "girl"],
    ["cartoon female", "girl"],
    ["cartoon lady", "girl"],
    ["cartoon character", "girl"],
    ["cartoon characters", "girls"],
    ["cartoon woman", "girl"],
    ["cartoon women", "girls"],
    ["cartoon girl", "girl"],
    ["anime female", "girl"],
    ["anime lady", "girl"],
    ["anime character", "girl"],
    ["anime characters", "girls"],
    ["anime woman", "girl"],
    ["anime women", "girls"],
    ["lady", "girl"],
    ["female", "girl"],
    ["females", "girls"],
    ["woman", "girl"],
    ["women", "girls"],
    ["people", "girls"],
    ["person", "girl"],
    ["a cartoon figure", "a figure"],
    ["a cartoon image", "an image"],
    ["a cartoon picture", "a picture"],
    ["an anime cartoon image", "an image"],
    ["a cartoon anime drawing", "a drawing"],
    ["a cartoon drawing", "a drawing"],
    ["girl girl", "girl"],
]  # fmt: skip

FACES = [
    "^_^", "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "o_o",
    "u_u", "x_x", "|_|", "||_||",
]  # fmt: skip

HAIR_STYLES = (
    r"ponytail|braid|ahoge|twintails|[\w\-]+ bun|single hair bun|single side bun|two side up|two tails|[\w\-]+ braid"
    r"|sidelocks"
)

ANIME: dict[str, dict[str, Any]] = {
    "captions": {
        # [words, what stands for them]: in this order, all again until nothing changes.
        "replace": WORDS_FOR_PEOPLE,
    },
    "tags": {
        # "long_hair" -> "long hair".
        "underscores": True,
        # But not in these.
        "keep": FACES,
        # [tag, what stands for it]; "" removes it.
        "replace": [],
        # Regular expressions for whole tags that go: DeepDanbooru's rating.
        "remove": [r"rating[:_ ].*"],
        # A tag that one of these fits says that several people are seen ...
        "several": [r".*(girls|boys)"],
        # ... and then nobody can tell whose hair is blonde: of each of these kinds, two tags or more go altogether. A
        # single one is everyone's, and stays.
        "ambiguous": [
            r"(long|short|medium) hair",
            r"(bob|hime) cut",
            r"[\w\-]+ eyes",
            r"[\w\-]+ sleeves|sleeveless",
            HAIR_STYLES,
            r"(?!(long|short|medium) hair)[\w\-]+ hair",
        ],
        # Tags that say nothing beside one that says more, "shirt" beside "white shirt".
        "general": [r"[\w\-]+", "hair ornament"],
        # The same tag again.
        "duplicates": True,
    },
}

NOTHING: dict[str, dict[str, Any]] = {
    "captions": {"replace": []},
    "tags": {
        "underscores": False, "keep": [], "replace": [], "remove": [], "several": [], "ambiguous": [], "general": [],
        "duplicates": False,
    },
}  # fmt: skip

BASES = {"anime": ANIME, "none": NOTHING}
"""What a file of rules can start from with `base = "..."`; its own rules come before those."""
