"""Names and tensors that transformers changes on their way from files into models, and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .folder import foreign, refuse
from .tensors import Entry


def names_in(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
    """For every tensor of a checkpoint, its name in the model: checkpoints keep names that classes had earlier.

    Raises:
        CheckpointError: tensors would have to be merged or split, not just renamed.
    """
    found, merged = _renamed(model, entries)
    if merged:
        remedy = (
            "load it with transformers, from_pretrained(..., quantization_config=AttnPruneConfig()), which merges them"
        )
        refuse(merged[0][:80], "a tensor that is one of the model's", "a part of one", remedy)
    return found


def merges(model: nn.Module, entries: Mapping[str, Entry]) -> bool:
    """Whether tensors of a checkpoint are merged or split on their way into the model."""
    return bool(_renamed(model, entries)[1])


def _renamed(model: nn.Module, entries: Mapping[str, Entry]) -> tuple[dict[str, str], list[str]]:
    """Names in the model, and the tensors that are no more than a part of one there."""
    state = model.state_dict(keep_vars=True)
    if entries.keys() <= state.keys():
        return {key: key for key in entries}, []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return {key: key for key in entries}, []
    with foreign(
        "config.json", "a config whose class transformers knows", "pass a dense model of the same class as model="
    ):
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    prefix = getattr(model, "base_model_prefix", None) or None
    told = {key: rename_source_key(key, renamings, converters, prefix, state) for key in entries}
    return {key: name for key, (name, _) in told.items()}, [key for key, (_, part) in told.items() if part is not None]


def apart(model: nn.Module, attention: Collection[str]) -> list[Any] | None:
    """What transformers changes when it writes a model, but for tensors of attention: these keep the model's own names.

    Older files hold Q, K and V in one tensor, which is split in equal parts when it is read: after pruning they need
    not be of equal size, and channels that rotate together need not lie where they lay.

    Args:
        model: one of transformers.
        attention: names of its attention modules.

    Returns:
        What is left; None where nothing is to be left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4
        return None
    known = model.__dict__.get("_weight_conversions")
    if known is None:  # as transformers itself does for a model that was not loaded
        known = [one for one in get_model_conversion_mapping(model, add_legacy=False) if not _adds_prefix(one)]
    names = [key for key in model.state_dict(keep_vars=True) if key.startswith(tuple(f"{one}." for one in attention))]
    kept = [one for one in known if not (isinstance(one, WeightConverter) and _makes(one, names))]
    return kept if len(kept) < len(known) else None


def _adds_prefix(conversion: Any) -> bool:
    return type(conversion).__name__ == "PrefixChange"


def _makes(conversion: Any, names: Collection[str]) -> bool:
    """Whether a conversion makes one of these tensors from others."""
    return any(re.search(pattern, name) for pattern in conversion.target_patterns for name in names)
