"""Imported first: lets torchvision be imported where its compiled operators are for another build of torch.

No attention uses them, but torchvision and what imports it would not load without those that are declared here.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with suppress(RuntimeError):
            import torchvision  # noqa: F401
