"""A trainer for Stable Diffusion models, driven by TOML files and kohya-style options."""

__version__ = "0.1.0"
