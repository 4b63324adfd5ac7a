"""Whether heads lie in projections where a view says: some are changed, and what follows from it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ...nn.heard import Calls
from ...values.layout import Projection
from ..base import AttentionView
from .runs import Result


class Heads:
    """Heads of one stand-in, whose weights are as before after every question.

    Args:
        view: the stand-in's view, or another one of the same host.
        outputs: runs the host plainly.
        alike: whether two of its results are the same.
    """

    def __init__(
        self,
        view: AttentionView,
        outputs: Callable[[], Result],
        alike: Callable[[Result, Result], bool],
    ) -> None:
        self.view, self.outputs, self.alike = view, outputs, alike
        self.layout = view.spec.layout

    def lie(self) -> bool:
        """Whether heads lie as the view says, where some are zero already: keys of a head whose queries are zero matter
        to nobody, or values that O does not read do not (a norm over all heads couples one of the two); and those of a
        head that O reads do."""
        keys = range(self.view.spec.kv_heads)
        zero = [key for key in keys if self._is_zero(key)]
        if not zero:
            return True
        free = not self._matters("k", zero[0]) or not self._matters("v", zero[0])
        return free and all(self._read_alone(key) for key in keys if key not in zero)

    def in_order(self, strictly: bool) -> bool:
        """Whether queries, keys and values are what the view says, head by head, and none is another.

        A query changes its own token only, keys and values others too. Keys of a head without queries matter to nobody,
        values do. Values that O does not read matter to nobody. Keys and values of a head that O reads alone matter.

        Args:
            strictly: both of the sentences about nobody hold; else one does, as a norm may couple what the other keeps
                apart.
        """
        keys = self.view.spec.kv_heads
        some = {0, 1, keys // 2 - 1, keys // 2, keys - 2, keys - 1}
        return all(self._apart(key, strictly) for key in sorted(some) if 0 <= key < keys)

    def _apart(self, key: int, strictly: bool) -> bool:
        own = self.layout.queries(key)
        tokens = [self._tokens(p, head) for p, head in (("q", own[0]), ("k", key), ("v", key))]  # type: ignore[arg-type]
        if any(tokens) and tokens[0] >= min(tokens[1:]):
            return False
        with self._zeroed("q", own):
            if not self._matters("v", key):
                return False
            with self._zeroed("o", self._others(key)):
                free = not self._matters("k", key)
        if free == strictly:  # the other sentence has to hold too, or instead
            with self._zeroed("o", own):
                free = not self._matters("v", key)
        return free and self._read_alone(key)

    def _tokens(self, projection: Projection, head: int) -> int:
        """For how many tokens O reads something else where a head of the first token is another; 0 if none is seen."""
        if not self.view.called:
            return 0
        read: list[Tensor] = []
        first, last = self.layout.span(projection, head)

        def other(module: object, inputs: object, channels: Tensor) -> Tensor:
            new = channels.clone()
            token = new[(0,) * (new.dim() - 1)][first:last]
            token += torch.linspace(1, 2, last - first, dtype=new.dtype)
            return new

        with ExitStack() as stack:
            owners = {id(slot.parameter): slot.owner for slot in self.view.slots.values()}
            stack.enter_context(Calls(owners, stack))  # also where the host reads their weights
            port = self.view.port("o")
            stack.callback(port.listen(lambda module, inputs, channels: read.append(channels.detach())).remove)
            self.outputs()
            stack.callback(self.view.port(projection).listen(other).remove)
            self.outputs()
        return int((read[0] != read[1]).any(-1).sum()) if len(read) == 2 else 0

    def _others(self, key: int) -> list[int]:
        """Query heads of the other key heads."""
        return [head for head, own in enumerate(self.layout.key_of) if own != key]

    def _read_alone(self, key: int) -> bool:
        """Whether keys, and values, of a key head change the output where O reads no other heads than its own."""
        with self._zeroed("o", self._others(key)):
            return self._matters("k", key) and self._matters("v", key)

    def _matters(self, projection: Projection, head: int) -> bool:
        """Whether other weights of a head change the output."""
        expected = self.outputs()
        generator = torch.Generator("cpu").manual_seed(4)

        def other(old: Tensor) -> Tensor:
            return torch.randn(old.shape, generator=generator, dtype=old.dtype)

        with self._changed(projection, [head], other):
            return not self.alike(self.outputs(), expected)

    @contextmanager
    def _zeroed(self, projection: Projection, heads: Sequence[int]) -> Iterator[None]:
        """Weights and biases of heads are zero meanwhile."""
        with self._changed(projection, heads, torch.zeros_like):
            if f"{projection}.bias" not in self.view.slots:
                yield
                return
            with self._changed(projection, heads, torch.zeros_like, "bias"):
                yield

    @contextmanager
    def _changed(
        self, projection: Projection, heads: Sequence[int], change: Callable[[Tensor], Tensor], name: str = "weight"
    ) -> Iterator[None]:
        slot = self.view.slots[f"{projection}.{name}"]
        channels = slot.cut(slot.parameter.detach()).clone()
        new = channels.clone()
        for head in heads:
            own = slice(*self.layout.span(projection, head))
            new[own] = change(new[own])
        slot.write(new)
        try:
            yield
        finally:
            slot.write(channels)

    def _is_zero(self, key: int) -> bool:
        """Whether all queries of a key head are zero."""
        slot = self.view.slots["q.weight"]
        channels = slot.cut(slot.parameter.detach())
        return not any(bool(channels[slice(*self.layout.span("q", head))].any()) for head in self.layout.queries(key))
