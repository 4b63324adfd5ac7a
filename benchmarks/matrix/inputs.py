"""What a model of transformers is called with, by the names of its arguments: :func:`inputs_for`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .configs import FIRST_MARK
from .odd import SHAPES

BATCH, TOKENS, TARGETS = 2, 12, 5
TEXT = ("input_ids", "attention_mask", "bbox")
TARGET = ("decoder_input_ids",)
SEEN = ("pixel_values", "pixel_values_videos", "video_pixel_values", "image_grid_thw", "grid_thw", "video_grid_thw")
HEARD = ("input_features", "input_features_mask", "feature_attention_mask", "input_values", "input_audio_embeds")
Inputs = dict[str, Any]


class Unusable(Exception):
    """A model that none of the inputs fits; says what it raised."""


def inputs_for(model: nn.Module, kind: str, run: Any) -> Inputs:
    """Inputs that the model takes, the fullest first.

    Args:
        model: a model of transformers.
        kind: its ``model_type``.
        run: runs the model on inputs; raises where it does not take them.
    """
    first: Exception | None = None
    for given in _candidates(model, kind):
        for _ in range(2):
            try:
                run(model, given)
                return given
            except Exception as error:
                first = first or error
                marked = _marked(model, given, error)
                if marked is None:
                    break
                given = marked
    raise Unusable(f"{type(first).__name__}: {str(first).strip()[:300]}") from first


def _candidates(model: nn.Module, kind: str) -> Iterator[Inputs]:
    if kind in SHAPES:
        yield {name: _of_shape(shape) for name, shape in SHAPES[kind].items()}
        return
    names = inspect.signature(model.forward).parameters
    required = [
        name
        for name, one in names.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    main = str(getattr(model, "main_input_name", "input_ids"))
    makers = _Makers(model.config, list(names))
    seen, heard = ([name for name in group if name in names] for group in (SEEN, HEARD))
    text = [name for name in TEXT if name in names and (name != "attention_mask" or "input_ids" in names)]
    target = [name for name in TARGET if name in names]
    wholes = (
        [*text, *seen, *heard, *target, main],
        [*text, *seen, *target, main],
        [*text, *heard, *target, main],
        [*seen, *target, main],
        [*heard, *target, main],
        [*text, *target, main],
        [*text, *target],
        [main],
    )
    tried = set()
    for whole in wholes:
        wanted = tuple(dict.fromkeys([*required, *whole]))
        wanted = tuple(name for name in wanted if name in names or name in required)
        if wanted in tried or not all(makers.makes(name) for name in required):
            continue
        tried.add(wanted)
        yield from makers.all(wanted)
    if not tried:
        raise Unusable(f"nothing is known of the arguments {[n for n in required if not makers.makes(n)]}")


def _of_shape(shape: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    if not isinstance(shape, tuple):
        return shape  # a value
    if shape and isinstance(shape[0], tuple):
        return torch.randint(shape[1], shape[2], shape[0], generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _marked(model: nn.Module, given: Inputs, error: Exception) -> Inputs | None:
    """The same inputs with as many image (or audio) tokens in the text as the model says it has features for."""
    found = re.search(r"tokens:? *(\d+).*?features:? *(\d+)", str(error).replace("\n", " "))
    if found is None or "input_ids" not in given:
        return None
    config, ids = model.config, given["input_ids"]
    word = "audio" if any(name in given for name in HEARD) else "video" if "pixel_values_videos" in given else "image"
    names = [f"{word}_token_id", f"{word}_token_index"]
    mark = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    count = int(found[2]) // len(ids)
    if mark is None or not count:
        return None
    marks = torch.full((len(ids), count), mark)
    longer = torch.cat([ids[:, :2], marks, ids[:, 2:]], 1)
    return {**given, "input_ids": longer, "attention_mask": torch.ones_like(longer)}


class _Makers:
    """Tensors by the name of the argument."""

    def __init__(self, config: Any, names: list[str]) -> None:
        self.config = config
        self.packed = any(name.endswith("grid_thw") for name in names)  # patches of all images in one row
        self.generator = torch.Generator().manual_seed(1)

    def makes(self, name: str) -> bool:
        """Whether there is a tensor for the name."""
        return hasattr(self, f"_{name}")

    def all(self, names: tuple[str, ...]) -> Iterator[Inputs]:
        """Inputs of these names, in every layout that they may have."""
        known = [name for name in names if self.makes(name)]
        layouts = [list(getattr(self, f"_{name}")()) for name in known]
        for number in range(max(map(len, layouts), default=0)):
            yield {name: one[min(number, len(one) - 1)] for name, one in zip(known, layouts, strict=True)}

    def number(self, *names: str, default: int) -> int:
        """The first field of these names in the config or one within."""
        parts = ("", "vision_config", "audio_config", "encoder_config", "text_config", "backbone_config")
        for part in parts:
            config = getattr(self.config, part, None) if part else self.config
            for name in names if config is not None else ():
                value = getattr(config, name, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    # by argument

    def _input_ids(self) -> Iterator[Tensor]:
        yield self.whole(3, min(FIRST_MARK, self.number("vocab_size", default=FIRST_MARK)), BATCH, TOKENS)

    def _decoder_input_ids(self) -> Iterator[Tensor]:
        yield self.whole(3, min(FIRST_MARK, self.number("vocab_size", default=FIRST_MARK)), BATCH, TARGETS)

    def _attention_mask(self) -> Iterator[Tensor]:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        mask[1, -3:] = 0
        yield mask
        yield torch.ones(BATCH, TOKENS, dtype=torch.long)

    def _bbox(self) -> Iterator[Tensor]:
        corner = self.whole(0, 50, BATCH, TOKENS, 2)
        yield torch.cat([corner, corner + self.whole(1, 50, BATCH, TOKENS, 2)], -1)

    def _sizes(self) -> tuple[int, int, int]:
        size = self.number("image_size", "input_size", default=32)
        return self.number("num_channels", "in_channels", "in_chans", "num_input_channels", default=3), size, size

    def _pixel_values(self) -> Iterator[Tensor]:
        size, frames = self._sizes(), self.number("num_frames", "frames_per_clip", default=2)
        if self.packed:
            yield self._patches()
        yield self.normal(BATCH, *size)
        yield self.normal(BATCH, frames, *size)
        yield self.normal(BATCH, size[0], 64, 64)
        yield self.normal(BATCH, 1, 1, *size)

    def _patches(self) -> Tensor:
        """Two images of four by four patches, each a row."""
        side = self.number("patch_size", default=8)
        width = self.number("in_channels", "in_chans", "num_channels", default=3) * side * side
        return self.normal(BATCH * 16, width * self.number("temporal_patch_size", default=1))

    def _image_grid_thw(self) -> Iterator[Tensor]:
        yield torch.tensor([[1, 4, 4]] * BATCH)

    _grid_thw = _image_grid_thw

    def _hidden_states(self) -> Iterator[Tensor]:
        yield self._patches()

    def _pixel_values_videos(self) -> Iterator[Tensor]:
        yield self.normal(BATCH, self.number("frames_per_clip", "num_frames", default=2), *self._sizes())

    def _input_features(self) -> Iterator[Tensor]:
        bands = self.number("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", default=16)
        frames = 2 * self.number("max_source_positions", default=16)
        yield self.normal(BATCH, bands, frames)
        yield self.normal(BATCH, frames, bands)
        yield self.normal(BATCH, 64, bands)

    def _input_features_mask(self) -> Iterator[Tensor]:
        for features in self._input_features():
            yield torch.ones(BATCH, max(features.shape[1:]), dtype=torch.long)

    _feature_attention_mask = _input_features_mask

    def _qformer_input_ids(self) -> Iterator[Tensor]:
        yield self.whole(3, FIRST_MARK, BATCH, TARGETS)

    def _inputs_embeds(self) -> Iterator[Tensor]:
        yield self.normal(BATCH, TOKENS, self.number("hidden_size", default=64))

    def _input_values(self) -> Iterator[Tensor]:
        yield self.normal(BATCH, 2000)
        yield self.normal(BATCH, 1, 2000)
        yield self.normal(BATCH, self.number("max_length", default=24), self.number("num_mel_bins", default=16))
