"""Which modules the network of `train_network` has, known before the model is loaded."""

from __future__ import annotations

from pathlib import Path

from sd_train.config.network_args import NetworkArgs, block_counts, read_network_args, wrong_counts
from sd_train.config.options import RunConfig
from sd_train.errors import ConfigError, ModelError, Problems
from sd_train.families.parts import ModelKind, ModelParts
from sd_train.families.sizes import RankOf, lora_numbers, lora_tensors
from sd_train.families.sources import open_file, read_all
from sd_train.lora_files.adapter import Adapter
from sd_train.lora_files.reading import lora_from_tensors
from sd_train.lora_files.writing import refuse_leftovers
from sd_train.trainables.lora_layout import BlockSize, Layout, Size

DEFAULT_RANK = 4
_DEFAULT_ALPHA = 1.0
"""Of convolutions, as in sd-scripts."""


def network_numbers(config: RunConfig) -> tuple[int, float]:
    """The rank and alpha that the options give."""
    rank = config.network.network_dim or DEFAULT_RANK
    return rank, config.network.network_alpha or float(rank)


def told_numbers(config: RunConfig, kind: ModelKind | None) -> tuple[int | str, float | str]:
    """Rank and alpha as the metadata tell them; from a file's modules, "Dynamic" where these differ."""
    if not config.network.dim_from_weights or kind is None:
        return network_numbers(config)
    sizes = set((lora_layout(config, kind).own or {}).values())
    ranks, alphas = {size.rank for size in sizes}, {size.alpha for size in sizes}
    rank = ranks.pop() if len(ranks) == 1 else "Dynamic"
    return rank, alphas.pop() if len(alphas) == 1 else "Dynamic"


def network_args(config: RunConfig) -> NetworkArgs:
    """`--network_args`, which the rules have found right."""
    return read_network_args(config.network.network_args, "--network_args", Problems())


def lora_layout(config: RunConfig, kind: ModelKind) -> Layout:
    """The modules of a LoRA on a model of `kind`.

    Raises:
        UserError: if ranks are to come from a file that is no plain LoRA.
    """
    args, counts = network_args(config), block_counts(_is_sdxl(kind))
    weights = args.block_weights(counts)
    if config.network.dim_from_weights and config.network.network_weights is not None:
        own = {
            (adapter.place.role, adapter.place.path): Size(adapter.rank or 0, adapter.alpha or 0.0)
            for adapter in start_adapters(config.network.network_weights, kind.family)
        }
        return Layout(weights=weights, own=own, sdxl=_is_sdxl(kind))
    rank, alpha = config.network.network_dim or DEFAULT_RANK, config.network.network_alpha
    conv_alpha = _DEFAULT_ALPHA if args.conv_alpha is None else args.conv_alpha
    wide = None if args.conv_dim is None else Size(args.conv_dim, conv_alpha)
    blocks: tuple[BlockSize, ...] = ()
    if any((args.block_dims, args.block_alphas, args.conv_block_dims, args.conv_block_alphas)):
        dims = args.block_dims or (rank,) * counts.total
        alphas = args.block_alphas or (alpha,) * counts.total
        wide_dims = args.conv_block_dims or (args.conv_dim or 0,) * counts.total
        wide_alphas = args.conv_block_alphas or (conv_alpha,) * counts.total
        wides = map(Size, wide_dims, wide_alphas) if any(wide_dims) else [None] * counts.total
        blocks = tuple(map(BlockSize, map(Size, dims, alphas), wides))
    return Layout(wide, blocks, weights, sdxl=_is_sdxl(kind))


def network_sizes(config: RunConfig, kind: ModelKind, parts: ModelParts) -> dict[str, int]:
    """How many numbers the LoRA has in each network of the model `parts`, by role."""
    return lora_numbers(parts, network_numbers(config)[0], _ranks(config, kind), lora_layout(config, kind).convolutions)


def network_tensors(config: RunConfig, kind: ModelKind, parts: ModelParts) -> dict[str, list[int]]:
    """How many numbers each tensor of the LoRA has in the networks of the model `parts`, by role."""
    return lora_tensors(parts, _ranks(config, kind), lora_layout(config, kind).convolutions)


def _ranks(config: RunConfig, kind: ModelKind) -> RankOf:
    layout, (rank, alpha) = lora_layout(config, kind), network_numbers(config)

    def rank_of(role: str, path: str, wide: bool) -> int:
        size = layout.size(role, path, wide, Size(rank, alpha))
        return 0 if size is None else size.rank

    return rank_of


def network_warnings(config: RunConfig, kind: ModelKind | None) -> list[str]:
    """What a reader of the saved file makes of it that is not meant."""
    own = config.command == "train_network" and config.network.network_module == "networks.lora"
    if kind is None or not own or config.network.output_lora_format != "kohya":
        return []
    layout = lora_layout(config, kind)
    sizes = [block.narrow for block in layout.blocks]
    sizes += [size for (_, path), size in (layout.own or {}).items() if "attn" in path]
    if len({size.alpha or size.rank for size in sizes if size.rank}) < 2:
        return []
    return [
        "the modules' alphas differ, and diffusers loses those of attention layers in kohya's files (other programs "
        "read them); for diffusers give --output_lora_format diffusers"
    ]


def _is_sdxl(kind: ModelKind) -> bool:
    """The refiner's U-Net has as many blocks as those of 1.x and 2.x."""
    return kind.family == "sdxl"


def check_network(config: RunConfig, kind: ModelKind | None) -> None:
    """What of a network's options does not fit the model.

    Raises:
        ConfigError: with every problem.
    """
    if config.command != "train_network" or config.network.network_module != "networks.lora":
        return
    args, where = network_args(config), "--network_args"
    problems = [] if kind is None else [str(one) for one in wrong_counts(args, block_counts(_is_sdxl(kind)), where)]
    text_only = config.network.network_train_text_encoder_only or config.network.unet_lr == 0
    if not problems and kind is not None and not text_only and not _learns(lora_layout(config, kind)):
        problems.append(f"{where}: no block of the U-Net has both a rank and a weight above 0 (and above "
                        "block_lr_zero_threshold), so that it would learn nothing; raise one of them, or give "
                        "network_train_text_encoder_only")
    if problems:
        raise ConfigError(*problems)


def _learns(layout: Layout) -> bool:
    """Whether any block of the U-Net has modules."""
    counts = block_counts(layout.sdxl)
    # The first block is a single convolution, which never has one.
    inner = range(counts.around + 1, counts.total - counts.around)
    return layout.own is not None or any(
        (not layout.weights or layout.weights[number] > 0)
        and (not layout.blocks or any(size is not None and size.rank for size in layout.blocks[number]))
        for number in inner
    )


def start_adapters(path: Path, family: str) -> tuple[Adapter, ...]:
    """The modules of the plain LoRA in `path`, of kohya's or diffusers' format.

    Raises:
        ModelError: if it holds none, something else, or more.
    """
    source, metadata = open_file(path)
    where = f"--network_weights = {path}"
    try:
        lora = lora_from_tensors(read_all(source), metadata, family, where)
    except ModelError:
        raise ModelError(
            f"{where}: holds no LoRA, neither of kohya's programs nor of diffusers (see sd-train lora check); a base "
            "model is given with --pretrained_model_name_or_path"
        ) from None
    refuse_leftovers(lora)
    adapters = tuple(lora.adapters())
    others = sorted({"DoRA" if adapter.is_dora else adapter.kind for adapter in adapters if not adapter.is_plain})
    if others:
        raise ModelError(
            f"{where}: holds modules of other algorithms ({', '.join(others)}), networks.lora goes on from plain LoRA "
            "only; convert the file with sd-train lora convert --to lora, or choose network_module lycoris.kohya"
        )
    return adapters
