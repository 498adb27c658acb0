"""Models of transformers that put an image into words: BLIP, BLIP-2, GIT, encoder-decoders, and those that chat.

What nucleus sampling draws depends on the seed and the image alone, not on the other images of its batch.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sd_train.data.resize import Pixels
from sd_train.device import DTYPES, out_of_memory
from sd_train.errors import ModelError, RunError
from sd_train.families.hub import Wanted, find_model
from sd_train.families.pickles import read_pickled_tensors
from sd_train.prepare.caption_models import CHAT_PROMPT, DEFAULT_CAPTIONER, PROMPTS

_SMALL = re.compile(r"[\w.-]+\.(?:json|txt|model|jinja)")
_WEIGHTS = (re.compile(r"model(?:-\d+-of-\d+)?\.safetensors"), re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin"))
"""The first kind that is there counts."""
_NUCLEUS_PENALTY = 1.1
"""BLIP's own penalty for words that are repeated, without which nucleus sampling stutters."""


@dataclass(frozen=True)
class Wording:
    """How captions are made."""

    num_beams: int | None
    """None: nucleus sampling."""
    top_p: float
    max_length: int
    """Tokens of a caption, without the prompt."""
    min_length: int


def _weights(names: Iterable[str]) -> list[str]:
    """The files of weights among `names`, in order."""
    names = sorted(names)
    found = ([name for name in names if kind.fullmatch(name)] for kind in _WEIGHTS)
    return next(filter(None, found), [])


def _choose(names: Sequence[str]) -> list[str]:
    small, weights = [name for name in names if _SMALL.fullmatch(name)], _weights(names)
    return [*small, *weights] if weights and "config.json" in small else []


def _is_whole(folder: Path) -> bool:
    return bool(_choose([path.name for path in folder.iterdir()]))


def find_captioner(source: str) -> Path:
    """The folder of the model `source`: itself, or what the hub or its cache has under this id.

    Raises:
        ModelError: if there is none.
    """
    give = f"a folder that transformers wrote, or a hub id such as {DEFAULT_CAPTIONER}"
    if source.startswith(("http://", "https://")) or source.lower().endswith((".pth", ".pt")):
        raise ModelError(f"{source}: BLIP's first files (.pth) are not read; the same weights are {DEFAULT_CAPTIONER}")
    folder = find_model(source, wanted=Wanted("captioning model of transformers", give, _choose, _is_whole))
    if not folder.is_dir() or not _is_whole(folder):
        lacks = "is a file" if folder.is_file() else "holds no config.json with weights beside it"
        raise ModelError(f"{source}: {lacks}; give {give}")
    return folder


Seen = dict[str, Tensor] | Pixels
"""What a model is shown of an image."""


class Captioner:
    """A captioning model, loaded."""

    def __init__(self, folder: Path, device: torch.device, precision: str, prompt: str | None = None) -> None:
        """`prompt` None is the model's usual one.

        Raises:
            ModelError: if `folder` holds nothing that makes text of an image, or takes no `prompt`.
        """
        self._folder, self._device, self._dtype = folder, device, DTYPES[precision]
        with _understood(folder), _silent():
            model = _load_model(folder, self._dtype)
            self._processor, self._images, self._tokenizer = _load_processor(folder)
            self._kind: str = model.config.model_type
            self._takes = inspect.signature(model.forward).parameters
            self._chats = bool(getattr(self._processor, "chat_template", None))
            usual = CHAT_PROMPT if self._chats else PROMPTS.get(self._kind, "")
            self._prompt = usual if prompt is None else prompt
            self._text = {} if self._chats else self._text_inputs()
        self._model = model.to(device).eval()

    def see(self, pixels: Pixels) -> Seen:
        """What the model is shown of an image [height, width, 3] in RGB.

        Raises:
            ModelError: if the model has no use for it.
        """
        if self._chats:
            # How many words an image takes the place of depends on its size: text and images go together.
            return pixels
        # Not silenced: that is for the whole process, and this runs in threads.
        with _understood(self._folder):
            seen = self._images(images=np.ascontiguousarray(pixels), return_tensors="pt")
        return {name: value for name, value in seen.items() if isinstance(value, Tensor)}

    def __call__(self, images: Sequence[Seen], wording: Wording, seeds: Sequence[int]) -> list[str]:
        """A caption for each of `images`, as `see` made them; `seeds` are those of nucleus sampling.

        Raises:
            ModelError: if the model fails.
            RunError: if the memory is too small.
        """
        try:
            with _understood(self._folder), _silent(), torch.inference_mode():
                inputs = self._inputs(images)
                self._check_length(inputs, wording)
                found = self._model.generate(**inputs, **self._ways(wording, seeds))
        except (RuntimeError, MemoryError) as problem:
            if out_of_memory(problem):
                way_out = "choose a smaller --batch_size, --mixed_precision bf16 or a smaller model"
                raise RunError(f"the memory is too small for {len(images)} images at once; {way_out}") from None
            raise ModelError(f"{self._folder}: fails ({problem}); give another model") from None
        given = inputs.get("input_ids")
        start = getattr(getattr(self._model.config, "text_config", self._model.config), "bos_token_id", None)
        if start is not None and bool((found[:, 0] == start).all()):
            # BLIP's is unknown to its tokenizer.
            found, given = found[:, 1:], None if given is None else given[:, 1:]
        if given is not None and found.shape[1] >= given.shape[1] and torch.equal(found[:, : given.shape[1]], given):
            found = found[:, given.shape[1] :]
        return [self._tidied(text) for text in self._tokenizer.batch_decode(found, skip_special_tokens=True)]

    def _check_length(self, inputs: Mapping[str, Tensor], wording: Wording) -> None:
        decoder = getattr(self._model.config, "decoder", None) or self._model.config.get_text_config(decoder=True)
        places: int | None = getattr(decoder, "max_position_embeddings", None)
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
        if places is not None and prompt + wording.max_length > places:
            most = max(1, places - prompt)
            raise ModelError(f"{self._folder}: has places for {most} tokens of a caption, but --max_length is "
                             f"{wording.max_length}; write --max_length {most} or less")  # fmt: skip

    def _inputs(self, images: Sequence[Seen]) -> dict[str, Tensor]:
        """What the model takes of a batch."""
        batch: Mapping[str, Any]
        if self._chats:
            content = [{"type": "image"}, *([{"type": "text", "text": self._prompt}] if self._prompt else [])]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            # The template writes the beginning of a text itself.
            batch = self._processor(
                images=list(images), text=[text] * len(images), return_tensors="pt", padding=True,
                add_special_tokens=False,
            )  # fmt: skip
        else:
            seen = cast(Sequence[dict[str, Tensor]], images)
            batch = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
            batch |= {name: value.repeat(len(images), 1) for name, value in self._text.items()}
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
            for name, value in batch.items()
            if isinstance(value, Tensor) and (name != "token_type_ids" or name in self._takes)
        }

    def _text_inputs(self) -> dict[str, Tensor]:
        """What the model takes of the prompt, [1, tokens] each."""
        if not self._prompt:
            return {}
        if self._processor is None or "input_ids" not in self._takes:
            raise ModelError(f"{self._folder}: the model takes no words; leave --prompt out")
        if self._kind == "git":
            # It goes on only from a text that has a beginning and no end.
            ids = [self._tokenizer.cls_token_id, *self._tokenizer(self._prompt, add_special_tokens=False)["input_ids"]]
            return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones((1, len(ids)), dtype=torch.int64)}
        # Some processors put places for the image before the words: any image will do.
        grey = np.full((64, 64, 3), 128, np.uint8)
        both = self._processor(images=grey, text=self._prompt, return_tensors="pt")
        seen = self._images(images=grey, return_tensors="pt")
        return {name: value for name, value in both.items() if isinstance(value, Tensor) and name not in seen}

    def _ways(self, wording: Wording, seeds: Sequence[int]) -> dict[str, Any]:
        ways: dict[str, Any] = {
            "do_sample": False, "max_new_tokens": wording.max_length, "min_new_tokens": wording.min_length,
        }  # fmt: skip
        if wording.num_beams is not None:
            return {**ways, "num_beams": wording.num_beams}
        from transformers import LogitsProcessorList, TopPLogitsWarper

        drawn = LogitsProcessorList([TopPLogitsWarper(wording.top_p), DrawnPerImage(seeds)])
        return {**ways, "num_beams": 1, "repetition_penalty": _NUCLEUS_PENALTY, "logits_processor": drawn}

    def _tidied(self, text: str) -> str:
        """`text` in one line, without the prompt."""
        words, prompt = " ".join(text.split()), self._prompt
        # Tokens spell the prompt in their own way.
        ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        spelt = " ".join(self._tokenizer.decode(ids, skip_special_tokens=True).split()) if ids else ""
        if spelt and words.lower().startswith(spelt.lower()):
            words = words[len(spelt) :].strip()
        return words


class DrawnPerImage:
    """Makes the choice of the likeliest token a draw: each image adds Gumbel noise of its own stream.

    The largest of (logit + Gumbel noise) is a draw from the logits' distribution.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [image, token] with the noise of one more step."""
        drawn = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self._streams])
        smallest = torch.finfo(torch.float32).tiny
        noise = -torch.log(-torch.log(drawn.clamp(smallest, 1 - 2**-24)))
        return scores.float() + noise.to(scores.device)


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    ways: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights = _weights(path.name for path in folder.iterdir())
    if weights[0].endswith(".safetensors"):
        model, told = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **ways
        )
        _check_complete(folder, model, told)
        return model
    # transformers would open the pickles itself.
    tensors = {key: value for name in weights for key, value in read_pickled_tensors(folder / name).items()}
    config = AutoConfig.from_pretrained(str(folder), **ways)
    with torch.device("meta"):
        kind = type(AutoModelForImageTextToText.from_config(config, trust_remote_code=False))
    model, told = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    _check_complete(folder, model, told)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model


def _check_complete(folder: Path, model: Any, told: Mapping[str, Any]) -> None:
    """What the files lack transformers fills with random numbers.

    Raises:
        ModelError: if that is a tenth of the model or more; less is only warned of, as it may not be used.
    """
    missing = sorted(told["missing_keys"])
    said = f"{folder}: {len(missing)} of the model's weights are missing (such as {missing[0]})" if missing else ""
    if 10 * len(missing) >= len(model.state_dict()):
        raise ModelError(f"{said}; download it again, or give the whole model")
    if missing:
        print(f"warning: {said}: look whether the captions make sense", file=sys.stderr)


def _load_processor(folder: Path) -> tuple[Any, Any, Any]:
    """(processor of images and texts or None, of images, tokenizer); images by Pillow, not by torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    ways: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    processor = None
    with contextlib.suppress(OSError, ValueError):
        processor = AutoProcessor.from_pretrained(str(folder), backend="pil", **ways)
    images, tokenizer = (getattr(processor, name, None) for name in ("image_processor", "tokenizer"))
    if images is not None and tokenizer is not None:
        return processor, images, tokenizer
    # Encoders with a decoder have no processor of both.
    return None, AutoImageProcessor.from_pretrained(str(folder), backend="pil", **ways), AutoTokenizer.from_pretrained(
        str(folder), **ways
    )  # fmt: skip


@contextlib.contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """What transformers says about a model that it cannot use, as our kind of error."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        way_out = f"give another model, such as {DEFAULT_CAPTIONER}"
        raise ModelError(f"{folder}: transformers cannot caption with it ({reason}); {way_out}") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers speaks of what concerns its own users."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device `name`; "auto": a GPU if there is one.

    Raises:
        RunError: if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = (str(problem) or "it is not there").splitlines()[0]
        raise RunError(f"--device {name}: cannot be used ({reason}); leave it out, or write --device cpu") from None
    return device
