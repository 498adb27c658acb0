"""The published captioning models, and what they are asked."""

from __future__ import annotations

import re

DEFAULT_CAPTIONER = "Salesforce/blip-image-captioning-large"
PUBLISHED = (
    "Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large", "Salesforce/blip2-opt-2.7b",
    "Salesforce/blip2-flan-t5-xl", "microsoft/git-base-coco", "microsoft/git-large-coco",
    "microsoft/git-large-textcaps", "nlpconnect/vit-gpt2-image-captioning",
)  # fmt: skip
"""What `--caption_weights` may name on the hub; others that transformers loads work as well."""
PROMPTS = {"blip": "a picture of"}
"""What captions begin with, and lose again, where `--prompt` is not given: by `model_type`."""
CHAT_PROMPT = "Describe this image in one sentence."
"""The same for models that are talked to."""

_QUOTED = r"""(?:"[^"]*(?:"|$)|'[^']*(?:'(?!\w)|$)|[\w.-]+)"""
_SAID = re.compile(
    r"\s*,?\s*\b(?:"
    r"(?:(?:with|has|having|and)\s+)(?:(?:the|a)\s+)?(?:words?|letters?|names?|numbers?|text)"
    r"|(?:with\s+a\s+sign\s+)?(?:that|which)\s+(?:says?|reads?)(?:\s+the\s+words?)?"
    rf")\s+{_QUOTED}(?:\s+(?:written\s+)?(?:on|in)\s+(?:it\b|them\b|(?:the|its|her|his|their|a)\s+\w+))?",
    re.IGNORECASE,
)
"""What a caption says about writing in the image: 'with the word "stop" on it', "that says hello"."""


def without_writing(caption: str) -> str:
    """`caption` without what it says is written in the image, which models often read wrongly."""
    return " ".join(_SAID.sub("", caption).split())
