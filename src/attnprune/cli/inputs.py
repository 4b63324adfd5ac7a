"""Inputs for a model: from a safetensors file, or made up."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError


class DataFile:
    """Batches of a safetensors file whose tensors are the model's keyword inputs, samples along the first dimension.

    Read batch by batch, as often as it is iterated over. Floating-point tensors take the model's dtype.

    Args:
        path: the file.
        model: who will be called with the batches; tried out on the first one.
        batch_size: samples of a batch; the last one may have fewer.
        samples: how many of the file's to use; None: all.

    Raises:
        DataError: no such file, a tensor that is none of the model's inputs, one that is missing, numbers of samples
            that differ, or a batch that the model cannot run.
    """

    def __init__(self, path: Path, model: nn.Module, batch_size: int, samples: int | None = None) -> None:
        self.path, self.model, self.batch_size = path, model, batch_size
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        sizes = self._sizes()
        self._check_names(sizes)
        counts = {name: shape[0] if shape else 0 for name, shape in sizes.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise DataError(path.name, "as many samples of every input", found, "cut them to the same number")
        self.count = min(next(iter(counts.values())), samples or 1 << 62)
        if self.count < 1:
            raise DataError(path.name, "at least one sample", "none", "samples go along the first dimension")
        self._try()

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.count, self.batch_size):
            yield self._read(start, min(start + self.batch_size, self.count))

    def first(self, samples: int) -> dict[str, Tensor]:
        """The first samples without their labels, on the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = self._read(0, min(samples, self.count))
        return {name: value.to(device) for name, value in batch.items() if "label" not in name}

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            found = str(error)[:80] if self.path.exists() else "no such file"
            remedy = "write one with safetensors.torch.save_file"
            raise DataError(str(self.path), "a safetensors file of inputs", found, remedy) from error

    def _sizes(self) -> dict[str, list[int]]:
        with self._open() as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def _read(self, start: int, stop: int) -> dict[str, Tensor]:
        with self._open() as file:
            batch = {name: file.get_slice(name)[start:stop] for name in file.keys()}  # noqa: SIM118
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in batch.items()}

    def _check_names(self, sizes: dict[str, list[int]]) -> None:
        known = [
            name
            for name, one in inspect.signature(self.model.forward).parameters.items()
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        main = getattr(self.model, "main_input_name", None)
        if main in known and main not in sizes:
            raise DataError(self.path.name, f"a tensor {main}", str(sorted(sizes))[:80], f"name the inputs {main}")
        for name in sizes:
            if name not in known:
                near = get_close_matches(name, known, n=3, cutoff=0.0)
                raise DataError(
                    self.path.name, f"inputs of {type(self.model).__name__}", name, f"names are like {near}"
                )

    def _try(self) -> None:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = {name: value.to(device) for name, value in self._read(0, min(self.batch_size, self.count)).items()}
        try:
            with torch.no_grad():
                self.model(**batch)
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in batch.items())
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataError(self.path.name, "inputs that the model can run", shapes, reason) from error


def example_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor] | None:
    """Made-up inputs of the size that the config says; None where it does not say."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    first = next(model.parameters())
    noise = torch.Generator("cpu").manual_seed(0)
    try:
        if main == "pixel_values":
            size = config.image_size  # type: ignore[union-attr]
            sides = (size, size) if isinstance(size, int) else tuple(size)
            shape: tuple[int, ...] = (batch, config.num_channels, *sides)  # type: ignore[union-attr]
        elif main == "input_values":
            shape = (batch, config.max_length, config.num_mel_bins)  # type: ignore[union-attr]
        elif main == "input_ids":
            most = getattr(config, "max_position_embeddings", length)
            tokens = torch.randint(config.vocab_size, (batch, min(length, most)), generator=noise, device="cpu")  # type: ignore[union-attr]
            return {"input_ids": tokens.to(first.device), "attention_mask": torch.ones_like(tokens).to(first.device)}
        else:
            return None
    except (AttributeError, TypeError):
        return None
    return {main: torch.randn(shape, generator=noise, device="cpu").to(device=first.device, dtype=first.dtype)}
