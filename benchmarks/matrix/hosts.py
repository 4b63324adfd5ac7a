"""All model families of the matrix: :func:`hosts`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from . import torchvision_ops  # noqa: F401, before what imports torchvision
from .configs import tiny
from .inputs import inputs_for
from .running import Host, usable
from .zoo import elsewhere

GENERATE = (
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
"""Classes that generate, which are taken where there are any."""
OTHERS = [value for name, value in vars(auto).items() if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)]


def hosts() -> list[Host]:
    """Every family once: kinds of transformers that share a class count as one."""
    return [*_transformers(), *elsewhere()]


def _transformers() -> Iterator[Host]:
    found: dict[tuple[str, str], str] = {}
    for kind, config in CONFIG_MAPPING_NAMES.items():
        name = _class_of(kind)
        own = config.removesuffix("Config").lower() == re.sub("[-_]", "", kind)
        if name is not None and (own or (name, config) not in found):
            found[name, config] = kind
    for (name, _), kind in found.items():
        yield Host(kind, "transformers", partial(_build, kind, name), partial(_inputs, kind), {"class": name})


def _class_of(kind: str) -> str | None:
    """The name of the class that stands for a kind of model: one that generates, or the bare model."""
    encoder = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder = encoder and kind not in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    for mapping in (*(() if encoder else GENERATE), auto.MODEL_MAPPING_NAMES, *OTHERS):
        if kind in mapping:
            found: Any = mapping[kind]
            return str(found[0] if isinstance(found, (list, tuple)) else found)
    return None


def _build(kind: str, name: str) -> nn.Module:
    config = tiny(kind)
    config._experts_implementation = "eager"  # the fused kernel of experts has no double precision
    made: nn.Module = getattr(transformers, name)(config)
    return made


def _inputs(kind: str, model: nn.Module) -> dict[str, Any]:
    return inputs_for(model, kind, usable)


def warm(sources: Collection[str]) -> None:
    """Imports what nearly every family of these packages imports, so that its process need not."""
    tiny("llama")
    for name in ("LlamaForCausalLM", "BertModel", "ViTModel", "T5ForConditionalGeneration"):
        getattr(transformers, name)
    for name in ("torch._dynamo", "torch.export", "torch._dynamo.backends.debugging", *WARM):
        import_module(name)
    for source in set(sources) & PACKAGES.keys():
        import_module(PACKAGES[source])


WARM = (
    "attnprune.checkpoint.stock",
    "attnprune.checkpoint.load",
    "attnprune.checkpoint.save",
    "attnprune.calibration.bases",
)
PACKAGES = {"timm": "timm", "diffusers": "diffusers", "x-transformers": "x_transformers", "open_clip": "open_clip"}
