"""The published captioning models, and what they are asked."""

from __future__ import annotations

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
