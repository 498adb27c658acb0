"""Fills the caches that a run asks for, before its first update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm

from sd_train.data.cache import DiskCache, FillOptions, MemoryCache
from sd_train.data.store import RowStore, default_cache_dir
from sd_train.data.texts import DiskTexts, MemoryTexts, TextFill, all_captions
from sd_train.device import Device
from sd_train.diffusion.draws import fixed_latent_noise
from sd_train.errors import RunError, UserError
from sd_train.families.base import Family
from sd_train.plan import Prepared
from sd_train.plan_data import caches_latents, caches_texts
from sd_train.report import say_line


def fill_caches(prepared: Prepared, family: Family) -> None:
    """Encode what is to be encoded once, and let the batches take it from there.

    Raises:
        UserError: if an image cannot be read, or the disk refuses.
    """
    if caches_latents(prepared.config):
        fill_latents(prepared, family)
    if caches_texts(prepared.config):
        fill_texts(prepared, family)


def fill_latents(prepared: Prepared, family: Family) -> None:
    """Encode the images.

    Raises:
        UserError: as `fill_caches`.
    """
    device, config, updates = prepared.device, prepared.config, prepared.updates
    chosen, indexes = config.dataset, prepared.plan.indexes
    # What sd-scripts' files hold is one draw.
    suffix = None if chosen.cache_latents_sample else family.latents_suffix
    cache: MemoryCache | DiskCache = MemoryCache(suffix)
    if chosen.cache_latents_to_disk:
        store = RowStore((chosen.cache_dir or default_cache_dir()) / "latents")
        cache = DiskCache(store, family.encoder_digest("images"), suffix)

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        with device.autocast():
            return family.encode_images(device.move(pixels))

    share = device.world if chosen.cache_latents_to_disk else 1
    rank = device.rank if share > 1 else 0
    total = sum(len(range(rank, len(index), share)) for index in indexes)
    with (
        _together(device),
        tqdm(desc="caching latents", unit="image", total=total, disable=not device.is_main) as bar,
    ):
        cache.fill(indexes, encode, FillOptions(
            batch_size=chosen.vae_batch_size,
            workers=updates.settings.workers,
            progress=bar.update,
            rank=rank,
            world=share,
        ))  # fmt: skip
    if isinstance(cache, DiskCache):
        # What the other ranks have encoded is needed here too.
        cache.ready()
    if device.is_main:
        for note in cache.notes:
            say_line(note)
    updates.cache = cache
    if not chosen.cache_latents_sample:
        assert family.latent is not None
        shape, seed = family.latent.shape, prepared.progress.seed

        def draw_fixed(keys: Sequence[str], width: int, height: int) -> Tensor:
            return fixed_latent_noise(seed, keys, shape(width, height))

        updates.draw_fixed = draw_fixed


def fill_texts(prepared: Prepared, family: Family) -> None:
    """Encode the captions.

    Raises:
        UserError: as `fill_caches`.
    """
    device, config, updates = prepared.device, prepared.config, prepared.updates
    chosen = config.dataset
    captions = all_captions(
        prepared.plan.indexes, prepared.progress.seed, chosen.cache_caption_variants, prepared.plan.total_steps
    )

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        with device.autocast():
            return family.encode_texts(texts)

    on_disk = chosen.cache_text_encoder_outputs_to_disk
    share = len(captions[device.rank :: device.world]) if on_disk else len(captions)
    texts: MemoryTexts | DiskTexts = MemoryTexts()
    if on_disk:
        store = RowStore((chosen.cache_dir or default_cache_dir()) / "texts")
        texts = DiskTexts(store, f"{family.encoder_digest('texts')} {device.weight_dtype}")
    with (
        _together(device),
        tqdm(desc="caching captions", unit="caption", total=share, disable=not device.is_main) as bar,
    ):
        texts.fill(captions, TextFill(encode, bar.update, device.rank, device.world))
    if isinstance(texts, DiskTexts):
        texts.ready()
        for note in texts.notes if device.is_main else ():
            say_line(note)
    updates.texts = texts


@contextmanager
def _together(device: Device) -> Iterator[None]:
    """Leave the block when all ranks are through; where one fails, all end with a message, not with a lost connection.

    Raises:
        UserError: this rank's, or that there is another one's.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as found:
        problem = found
    if device.any(problem is not None):
        raise problem or RunError("another process could not fill its share of the cache; mend what it says")
