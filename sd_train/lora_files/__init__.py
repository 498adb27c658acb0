"""LoRA files of every program: read, checked, converted, merged, resized and extracted."""
