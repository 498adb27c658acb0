"""Filling a training's caches without training: what the two commands for it share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sd_train.entry import load_config
from sd_train.errors import ConfigError

_OTHER_FAMILIES = ("flux", "sd3", "lumina", "hunyuan_image", "t5xxl", "t5xxl_dtype")


def fill(what: str, about: str, argv: Sequence[str]) -> int:
    """Fill the cache `what`, cache_latents or cache_text_encoder_outputs, for the training whose options are `argv`.

    Raises:
        UserError: if the options are wrong, something cannot be read, or the disk refuses.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: sd-train {what} [OPTIONS OF A TRAINING]\n\n{about}")
        return 0
    config = load_config("train_network", _training(what, argv))
    # torch takes seconds to import, and wrong options need not wait for it.
    from sd_train.build import quiet_libraries
    from sd_train.build_caches import fill_latents, fill_texts
    from sd_train.build_network import merge_base
    from sd_train.families.registry import load_family
    from sd_train.plan import prepare
    from sd_train.plan_data import model_request, text_options

    prepared = prepare(config, trains=False)
    quiet_libraries()
    family = load_family(model_request(config), None)
    family.configure(text_options(config))
    merge_base(prepared, family)
    family.to(prepared.device.device, prepared.device.weight_dtype)
    # Options may ask for both caches, and for one in memory, which would be lost.
    (fill_latents if what == "cache_latents" else fill_texts)(prepared, family)
    if prepared.device.is_main:
        count = sum(len(index) for index in prepared.plan.indexes)
        noun = "latents" if what == "cache_latents" else "encoded captions"
        from sd_train.data.store import default_cache_dir

        print(f"{config.dataset.cache_dir or default_cache_dir()}: holds the {noun} of {count} images")
    prepared.device.close()
    return 0


def _training(what: str, argv: Sequence[str]) -> list[str]:
    """The options of the training, of which no more is known than that it takes from the cache `what`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _OTHER_FAMILIES:
        parser.add_argument(f"--{name}", nargs="?", const="given")
    parser.add_argument("--skip_existing", action="store_true")
    given, rest = parser.parse_known_args(list(argv))
    for name in _OTHER_FAMILIES:
        if getattr(given, name) is not None:
            raise ConfigError(f"--{name}: is for other models; give one of Stable Diffusion or SDXL without it")
    if given.skip_existing:
        print("note: --skip_existing has no effect: what is in the cache is always kept", file=sys.stderr)
    if not any(word.split("=")[0] == "--output_dir" for word in rest):
        # Nothing is written there.
        rest += ["--output_dir", "."]
    rest += [f"--{what}_to_disk"]
    if what == "cache_text_encoder_outputs" and "--network_train_unet_only" not in rest:
        rest += ["--network_train_unet_only"]
    return rest
