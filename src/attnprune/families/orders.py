"""In which order queries, keys and values lie in one projection that holds several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ..errors import OptionError
from ..values.layout import HeadLayout

PARTS = (1, 2, 4, 8)
"""Into how many equal parts a projection may be divided first, as models trained on several devices are."""


def orders_of(fused: str, layout: HeadLayout) -> list[str]:
    """Orders to try for a projection that holds these (``"qkv"``, ``"kv"``, ``"qk"``; ``"qx"`` for Q with more in it
    than K: :attr:`attnprune.AttentionSpec.q_extra`; ``"qg"`` for queries and gates of what O reads), the most usual
    first.

    Each is written from the slowest index to the fastest: the letters (which of the projections), ``h`` (key heads; the
    query heads of one lie side by side; for ``"qx"`` and ``"qg"`` query heads), ``d`` (channels of a head), or a number
    of equal parts.

    >>> orders_of("kv", HeadLayout((4, 4), (4, 4)))
    ['kv h d', 'h kv d', 'vk h d', 'h vk d', 'h d kv', '2 kv h d', '2 vk h d']
    """
    if fused == "qx":
        return ["h qx d", "h xq d", "qx h d"]
    letters = {"qkv": ("qkv", "qvk", "kqv", "kvq", "vqk", "vkq"), "kv": ("kv", "vk"), "qk": ("qk", "kq"),
               "qg": ("qg", "gq")}[fused]  # fmt: skip
    found = [order for word in letters for order in (f"{word} h d", f"h {word} d")]
    if layout.qk != layout.vo or layout.extra:  # as in multi-head latent attention
        return sorted(found, key=lambda order: order[0] != "h")
    found += [] if layout.grouped else [f"h d {word}" for word in letters[:1]]
    parts = [count for count in PARTS[1:] if len(layout.qk) % count == 0]
    return found + [f"{count} {word} h d" for count in parts for word in letters[:2]]


def check_order(where: str, order: str, fused: str) -> None:
    """Raises OptionError unless an order names ``h``, ``d`` and the letters of the fused projection once each."""
    words = order.split()
    rest = words[1:] if words and words[0].isdigit() and int(words[0]) > 0 else words
    if sorted("".join(sorted(word)) for word in rest) != sorted(["d", "h", "".join(sorted(fused))]):
        expected = f'the words {fused!r} (its letters in any order), "h" and "d" in some order, a number before or not'
        raise OptionError(
            f"{where}: order", expected, repr(order), f'write "{fused} h d" or "h {fused} d", or leave it'
        )


@lru_cache(maxsize=256)
def places_of(order: str, layout: HeadLayout) -> Mapping[str, Sequence[int]]:
    """Where the channels of each projection lie: ranges where they are a run, else tuples.

    >>> places_of("h qkv d", HeadLayout((1, 1), (1, 1)))
    {'q': (0, 3), 'k': (1, 4), 'v': (2, 5)}
    >>> places_of("qkv h d", HeadLayout((2,), (2,), (2,)))  # two query heads on one key head
    {'q': range(0, 4), 'k': range(4, 6), 'v': range(6, 8)}
    >>> places_of("h qx d", HeadLayout((1, 1), (1, 1), extra=2))
    {'q': (0, 3), 'x': (1, 2, 4, 5)}
    """
    words = order.split()
    letters = next(word for word in words if word not in ("h", "d") and not word.isdigit())
    alone = {*letters} <= {*"qxg"}  # nothing of key heads is among them: every query head has its own place
    keys, rows = layout.heads if alone else len(layout.qk), []
    for letter in sorted(letters, key="qkvgx".index):
        for head, size in enumerate(layout.sizes("o" if letter == "g" else letter)):  # type: ignore[arg-type]
            key = head if alone or letter in "kv" else layout.key_of[head]
            by_word = {"h": (key,), letters: (letters.index(letter),)}
            for channel in range(size):
                where = [(key * int(word) // keys,) if word.isdigit() else by_word.get(word, (head, channel))
                         for word in words]  # fmt: skip
                rows.append((where, letter))
    found: dict[str, list[int]] = {}
    ranked = sorted(range(len(rows)), key=lambda one: rows[one][0])
    place = [0] * len(rows)
    for rank, one in enumerate(ranked):
        place[one] = rank
    for one, (_, letter) in enumerate(rows):
        found.setdefault(letter, []).append(place[one])
    return {letter: _compact(places) for letter, places in found.items()}


def _compact(places: Sequence[int]) -> Sequence[int]:
    run = range(places[0], places[0] + len(places))
    return run if [*run] == [*places] else tuple(places)
