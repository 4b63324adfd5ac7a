"""DistributedDataParallel after surgery."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import WrappedModelError
from ..families.registry import plain


def rewrap(ddp: nn.Module) -> Any:
    """Makes a ``DistributedDataParallel`` anew around its module, with the same settings: call it after a step.

    It reduced gradients of parameters that are gone. The wrapper stays the same object, so whoever holds it (an
    Accelerator, say) need not be told; its own module hooks and mode stay. Communication hooks are not carried over:
    register them again. All processes must call this together.

    Args:
        ddp: the wrapper that the module was trained in, compiled or not.

    Returns:
        The same object.

    Raises:
        WrappedModelError: not a DistributedDataParallel.
    """
    given, ddp = ddp, plain(ddp)
    if not isinstance(ddp, DistributedDataParallel):
        remedy = "only DistributedDataParallel is wrapped anew"
        raise WrappedModelError("rewrap", "a DistributedDataParallel", f"a {type(ddp).__name__}", remedy)
    known: dict[str, Any] = ddp.__dict__
    names = inspect.signature(DistributedDataParallel.__init__).parameters.keys() & {
        "device_ids", "output_device", "dim", "broadcast_buffers", "process_group", "find_unused_parameters",
        "gradient_as_bucket_view", "static_graph", "mixed_precision",
    }  # fmt: skip
    options = {name: known[name] for name in names if name in known}
    if "bucket_bytes_cap" in known:
        options["bucket_cap_mb"] = known["bucket_bytes_cap"] / 2**20
    if options.get("device_ids") is None:
        options.pop("output_device", None)
    for parameter in ddp.module.parameters():
        parameter.grad = None if parameter.grad is None else torch.clone(parameter.grad)  # not a view of old buckets
    module, kept = ddp.module, {key: value for key, value in known.items() if key == "training" or "_hooks" in key}
    DistributedDataParallel.__init__(ddp, module, **options)  # the old reducer goes, and its hooks with it
    ddp.__dict__.update(kept)
    return given
