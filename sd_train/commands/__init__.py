"""The commands of `sd-train` beside the training ones."""
