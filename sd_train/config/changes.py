"""What it means to go on with other options, or as another training, than a state was saved with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

from sd_train.config.catalogue import options

ACCEPTED: Mapping[str, str] = {
    "base_model": "what was learned goes on over weights that it was not learned with",
    "command": "the state's weights go on as another command's, if these are the same ones",
    "dataset": "the running epoch begins anew, with the images and captions as they are now",
    "gradient_accumulation_steps": "an update takes another number of batches, and steps count such updates; the epoch "
    "goes on at the batch where it was, rounded down to a whole update",
    "optimizer_type": "all that the optimizer has learned (averages, step sizes) is lost, it begins anew",
    "prediction": "what was learned to predict the one is trained to predict the other",
    "processes": "an update takes another number of batches, and steps count such updates; the epoch goes on at the "
    "batch where it was, rounded down to a whole update",
    "seed": "order, noise and dropout are drawn otherwise, and the running epoch begins anew",
    "zero_terminal_snr": "the noise schedule is another one, also in the metadata of what is saved",
}
"""What happens where a difference is accepted."""

_RATE = "the learning rates are other ones from here on"
_CURVE = "the rates follow another curve from here on, counted from the training's beginning"
_END = "the training ends elsewhere; curves of the learning rate that lead to its end are other ones from here on"
_LOSS = "the loss is another one from here on"
_CACHE = "the same images and captions, computed at another time: results may round differently"
_ROUNDING = "the same computation, which may round differently"
_NETWORK = "the network computes or learns otherwise from here on"
_TEXT = "captions are encoded otherwise from here on"
_WORD = "it names or makes the word otherwise; the vectors go on"

_BY_GROUP: Mapping[str, str] = {
    "dataset": "the images, their order and the captions are those of the state (they were compared)",
    "network": _NETWORK,
    "full": _RATE,
    "embedding": _WORD,
    "noise": "noise and timesteps are drawn otherwise from here on",
    "loss": _LOSS,
    "ema": "the average is kept otherwise from here on",
}
_BY_OPTION: Mapping[str, str] = {
    "pretrained_model_name_or_path": "the same weights (they were compared) at another place",
    "v2": "the same weights (they were compared)",
    "sdxl": "the same weights (they were compared)",
    "vae": "the same weights (they were compared) at another place",
    **dict.fromkeys(("clip_skip", "max_token_length", "weighted_captions"), _TEXT),
    **dict.fromkeys(
        ("cache_dir", "vae_batch_size", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), _CACHE
    ),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk"), "cached latents are drawn once for each image, "
                    "others anew for each sample"),
    "cache_latents_sample": "latents are drawn otherwise from the autoencoder's posterior from here on",
    "cache_caption_variants": "captions are drawn from other variants from here on",
    "masked_loss": _LOSS,
    "network_weights": "the state's weights go on; the file is not read",
    "weights": "the state's weights go on; the file is not read",
    "init_word": "the state's vectors go on; the word is not looked at",
    **dict.fromkeys(("unet_lr", "text_encoder_lr", "learning_rate"), _RATE),
    "output_lora_format": "files are written in another form from here on",
    **dict.fromkeys(("base_weights", "base_weights_multiplier"), "the same weights with them (they were compared)"),
    "training_comment": "the files' metadata say so from here on",
    "no_metadata": "the files' metadata are others from here on",
    "stop_text_encoder_training": "the text encoder ends elsewhere; one that has ended and learns again goes on as it "
    "stands",
    "optimizer_type": "the same optimizer under another name",
    "max_grad_norm": "gradients are clipped otherwise from here on",
    "optimizer_args": "what they set acts from here on; what the optimizer has learned stays",
    **dict.fromkeys(("max_train_steps", "max_train_epochs"), _END),
    "gradient_checkpointing": _ROUNDING,
    "mixed_precision": "the forward pass computes in another precision from here on; the trained weights stay as they "
    "are, and fp16 finds its scale anew",
    "max_data_loader_n_workers": "nothing but how fast batches are prepared",
    **dict.fromkeys(("prior_loss_weight", "prior_preservation", "class_prompt"), _LOSS),
    **dict.fromkeys(("sdpa", "xformers", "torch_compile", "torch_compile_scope", "dynamo_backend"), _ROUNDING),
    "use_ema": "an average that was not kept begins with the weights as they stand, one that is not kept any more is "
    "lost",
    "ema_device": "nothing but where the average is kept",
    "sample_ema": "nothing but which weights pictures are made with",
}
_COMPARED_AS_FACTS = ("v_parameterization", "gradient_accumulation_steps", "seed", "zero_terminal_snr",
                      "train_batch_size")  # fmt: skip
"""Options that say something which is compared as it is, not as it was written."""
_NOT_COMPARED = ("debug_dataset", "verify_images", "trust_index", "allow_missing_captions", "skip_broken_images")
"""They look at images or let some through; what comes of that is compared."""


def way_out(fact: str) -> str:
    """What to do about a difference that was not accepted."""
    return (
        f"give what the state was saved with, or go on anyway with --resume_anyway {fact}, which means: "
        f"{ACCEPTED[fact]}"
    )


def meaning_of(name: str) -> str | None:
    """What a change of option `name` means where all facts are the same; None: nothing that needs to be said."""
    group = options()[name].group
    if name in _COMPARED_AS_FACTS or name in _NOT_COMPARED:
        return None
    if group == "optimizer" and name.startswith("lr_"):
        return _CURVE
    return _BY_OPTION.get(name, _BY_GROUP.get(group))


def changed_options(before: str, after: str) -> list[str]:
    """What the training depends on and differs between two texts of `dump_toml`: `name: before -> after: meaning`."""
    old, new = tomllib.loads(before), tomllib.loads(after)
    return [
        f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}: {meaning}"
        for name in options()
        if not (name == "max_train_steps" and "max_train_epochs" in new)
        if old.get(name) != new.get(name) and (meaning := meaning_of(name)) is not None
    ]
