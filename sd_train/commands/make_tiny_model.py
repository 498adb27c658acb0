"""`sd-train make_tiny_model`: a Stable Diffusion model of under 20 MB with random weights, to try things out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd_train.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Write the model that `argv` asks for.

    Raises:
        ConfigError: if something is in the way.
    """
    parser = argparse.ArgumentParser("sd-train make_tiny_model", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="a .safetensors file, or a folder in diffusers' layout")
    parser.add_argument(
        "--family",
        choices=("sd1", "sd2", "sd2-v", "sdxl", "refiner"),
        default="sd1",
        help="Stable Diffusion 1.x (default), 2.x for 512 pixels, 2.x for 768 pixels, SDXL, the SDXL refiner",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (default 0)")
    given = parser.parse_args(argv)
    if given.path.exists():
        raise ConfigError(f"{given.path}: exists already; choose another path or remove it")
    if given.path.suffix and given.path.suffix != ".safetensors":
        raise ConfigError(f"{given.path}: is neither a .safetensors file nor a folder; choose one of the two")
    # torch takes seconds to import, and --help does not need it.
    from sd_train.build import quiet_libraries
    from sd_train.demo.tiny_model import save_tiny_model

    quiet_libraries()
    save_tiny_model(given.path, given.seed, given.family)
    print(f"wrote {given.path}")
    return 0
