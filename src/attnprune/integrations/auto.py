"""Pruned models by transformers' own ``from_pretrained``: :class:`AttnPruneConfig`. Needs ``transformers`` 4.57."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.describe import shrunk
from ..checkpoint.entry import ENTRY, LOADER, ConfigEntry, from_entry
from ..checkpoint.hf import CONFIG
from ..nn.selected import Selected

METHOD = "attnprune"
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 57):
    raise ImportError(f"attnprune.integrations.auto needs transformers 4.57 or newer, found {transformers.__version__}")


@auto.register_quantization_config(METHOD)
class AttnPruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Passed as ``quantization_config=`` to ``from_pretrained`` of any class of transformers, also ``AutoModel``.

    The model then takes the shapes that pruning left in its config, on the meta device, before its weights are read.
    It goes by that name because transformers has no other hook between these two; the model that comes back is not
    quantised, does not say so, and trains and saves as any other. A directory of a dense model gives the dense model.

    The class need not be the one that was saved: a base model takes the shapes of one with a head and the other way
    round, and parameters that the files lack are made as transformers makes them.

    Raises:
        CheckpointError: the config's entry is malformed, or about another model (in ``from_pretrained``).

    >>> import tempfile
    >>> from transformers import AutoModelForImageClassification, ViTConfig, ViTModel
    >>> from attnprune import prune_attention
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8))
    >>> report = prune_attention(model, 0.5, heads="ragged")
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> again = AutoModelForImageClassification.from_pretrained(folder, quantization_config=AttnPruneConfig())
    >>> again.vit.layers[0].attention.q_proj.weight.equal(model.layers[0].attention.q_proj.weight)
    True
    """

    def __init__(self, **_: Any) -> None:
        self.quant_method = METHOD


@auto.register_quantizer(METHOD)
class Shapes(HfQuantizer):  # type: ignore[misc]
    """What transformers makes of an :class:`AttnPruneConfig`."""

    is_trainable = True

    def is_serializable(self, **_: Any) -> bool:
        return True

    def update_tp_plan(self, config: Any) -> Any:
        """Called before the model is built: its attention is ours to shape, whatever runs it."""
        return _unmarked(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """The same, in transformers 5."""
        return _unmarked(config)

    def preprocess_model(self, model: Any, *args: Any, **options: Any) -> None:
        """As transformers has it, but nothing is marked as quantised."""
        self._process_model_before_weight_loading(model)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """The skeleton takes the shapes of its config's entry."""
        entry = getattr(model.config, ENTRY, None)
        if entry is not None:
            shrunk(model, from_entry(entry, CONFIG), CONFIG)

    def postprocess_model(self, model: Any, *args: Any, **options: Any) -> None:
        """What transformers noted of a quantiser is removed."""
        del model.hf_quantizer
        for module in model.modules():
            vars(getattr(module, "config", nn.Identity())).pop("quantization_config", None)
        self._process_model_after_weight_loading(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """The entry names the attention modules as this class does, and what no file holds is there again."""
        for module in model.modules():
            if isinstance(module, Selected):
                module.index()
        if hasattr(model.config, ENTRY):
            ConfigEntry(model).commit()


def _unmarked(config: Any) -> Any:
    """A config that names no implementation of attention where ours was named, and those inside it."""
    for one in [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]:
        if getattr(one, "_attn_implementation", None) == LOADER:
            one._attn_implementation = None
    return config
