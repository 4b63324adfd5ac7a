"""Several processes: one set of scores, one plan, and DistributedDataParallel wrapped anew."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import PlanMismatchError, WrappedModelError
from .plan import Plan

Sums = Mapping[str, tuple[Tensor, Tensor, Tensor]]


def active() -> bool:
    """Whether this process is one of several of ``torch.distributed``."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def add_up(seen: Sums, count: int) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], int]:
    """Observed sums and their number over all processes; every one of them must call it, in the same order.

    Processes that saw nothing (an overflow, say) take part with nothing.
    """
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (dict(seen), count))
    total: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for theirs, _ in found:  # in the order of ranks: the same bits everywhere
        for name, parts in theirs.items():
            old = total.get(name)
            total[name] = parts if old is None else tuple(a + b for a, b in zip(old, parts, strict=True))
    return total, sum(number for _, number in found)


def check_same(plan: Plan) -> None:
    """Compares a plan's digest over all processes.

    Raises:
        PlanMismatchError: on every process, if any two plans differ; nothing has changed by then.
    """
    digests: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(digests, plan.digest)
    if len(set(digests)) > 1:
        found = ", ".join(f"{digest[:8]} on rank {rank}" for rank, digest in enumerate(digests[:4]))
        remedy = "give every process the same model, options and data, or send one plan to all (Plan.to_json)"
        raise PlanMismatchError("plan", "the same plan in every process", found, remedy)


def rewrap(ddp: nn.Module) -> DistributedDataParallel:
    """The module inside a ``DistributedDataParallel``, wrapped anew with the same settings: call it after a step.

    The old wrapper reduces gradients of parameters that are gone; do not use it any more. Communication hooks are not
    carried over. All processes must call this together.

    Args:
        ddp: the wrapper that the module was trained in.

    Raises:
        WrappedModelError: not a DistributedDataParallel.
    """
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
    return DistributedDataParallel(ddp.module, **options)
