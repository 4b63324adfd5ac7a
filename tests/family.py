"""What a model of the conformance suite is made of: :class:`Family`, and those that more than one file builds on."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from torch import Tensor, nn

from .selection import spread

Part = tuple[Tensor, Tensor | None]
Read = Callable[[Any], Any]


def itself(parameter: Tensor | None) -> Tensor | None:
    return parameter


def gradient(parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient, zeros if there is none."""
    if parameter is None:
        return None
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Family(ABC):
    """A tiny model, its inputs, and where an independent oracle finds the weights."""

    configs: tuple[dict[str, Any], ...] = ({},)

    @abstractmethod
    def build(self, **config: Any) -> nn.Module:
        """A dense model in float64."""

    @abstractmethod
    def inputs(self, generator: torch.Generator, **config: Any) -> dict[str, Any]:
        """Keyword arguments of one forward pass."""

    @abstractmethod
    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The output to compare."""

    @abstractmethod
    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        """Of a dense model: weight and bias of q, k, v, o, or what ``read`` gives for them; live views."""

    def beside(self, model: nn.Module, name: str, projection: str) -> list[Tensor]:
        """Other rows that read what a projection reads, as they lie in its Linear; live views."""
        return []

    @classmethod
    def cases(cls) -> tuple[dict[str, Any], ...]:
        return cls.configs


def randomised(model: nn.Module, size: float = 0.3) -> Any:
    """Weights large enough that every unit matters, biases not zero, float64."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * size)
    return model.eval()


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 12, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
KERNELS = ("eager", "sdpa")


class HFFamily(Family):
    """A Hugging Face model with tensors as inputs and ``last_hidden_state`` as output."""

    model: Any
    config: Any
    options: dict[str, Any] = IMAGE
    names = ("q_proj", "k_proj", "v_proj")
    o_name: str | None = "o_proj"
    configs = (
        *({"num_attention_heads": heads, "kernel": kernel} for kernel, heads in spread(KERNELS, (4, 3, 2))),
        {"num_attention_heads": 4, "kernel": "eager", "qkv_bias": False},
    )

    def build(self, kernel: str, **config: Any) -> nn.Module:
        built = self.config(**{**self.options, **config})
        built._attn_implementation = kernel
        return randomised(self.model(built))

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"pixel_values": normal(generator, 2, 3, 16, 16)}

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs).last_hidden_state

    def dense(self, model: nn.Module, name: str, read: Read = itself) -> dict[str, Part]:
        module = model.get_submodule(name)
        parts = dict(zip("qkv", (getattr(module, part) for part in self.names), strict=True))
        parts["o"] = getattr(module, self.o_name)
        return {p: (read(linear.weight), read(linear.bias)) for p, linear in parts.items()}


DECODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
           "intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 0, "attention_dropout": 0.0,
           "vocab_size": 20}  # fmt: skip


class Decoder(HFFamily):
    """Decoders with grouped queries and rotary embeddings; some with norms of queries and keys, windows or softcaps."""

    configs = (
        {"kind": "Llama", "kernel": "sdpa"}, {"kind": "Llama", "kernel": "eager", "num_key_value_heads": 1},
        {"kind": "Qwen3", "kernel": "eager"}, {"kind": "Olmo2", "kernel": "sdpa"}, {"kind": "Cohere", "kernel": "sdpa"},
        {"kind": "Gemma2", "kernel": "eager", "sliding_window": 4}, {"kind": "Mistral", "kernel": "sdpa"},
    )  # fmt: skip

    def build(self, kind: str, kernel: str, **config: Any) -> nn.Module:
        built = getattr(transformers, f"{kind}Config")(**{**DECODER, **config, "eos_token_id": 1, "bos_token_id": 1})
        built._attn_implementation = kernel
        return randomised(getattr(transformers, f"{kind}Model")(built))

    def inputs(self, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        return {"inputs_embeds": normal(generator, 2, 6, 24), "attention_mask": mask, "use_cache": False}


class Rows:
    """Some rows of a parameter, read and written like a tensor of their own."""

    def __init__(self, whole: Tensor, places: list[int]) -> None:
        self.whole, self.places = whole, torch.tensor(places)
        self.shape = torch.Size([len(places), *whole.shape[1:]])

    def _at(self, rows: Any) -> Any:
        if not isinstance(rows, tuple):
            return self.places[rows]
        return self.places[rows[0]][:, None], torch.tensor(rows[1], dtype=torch.long)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.whole[self._at(rows)]

    def __setitem__(self, rows: Any, values: Any) -> None:
        self.whole[self._at(rows)] = values

    def copy_(self, values: Tensor) -> None:
        self[:] = values


class _NoTorchvision(MetaPathFinder, Loader):
    """Stands in for torchvision, which has no build for every torch; timm wants it for data and a kind of norm."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def timm_module(name: str) -> Any:
    """A module of timm, with torchvision or without."""
    if find_spec("torchvision") is not None:
        return import_module(name)
    finder = _NoTorchvision()
    sys.meta_path.append(finder)
    try:
        return import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for key in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
            del sys.modules[key]
