"""Ways of pruning by name: :func:`read_ways`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import OptionError
from ..values.faults import Faults
from ..values.presets import PRESETS

DEFAULT = "default"
DENSE = "dense"


class Way(NamedTuple):
    """A name, and the options of :func:`attnprune.prune_attention` that it stands for."""

    name: str
    options: Mapping[str, Any]


def read_ways(ways: object) -> tuple[Way, ...]:
    """What a user means by ``ways``: presets by name, ``"default"``, and mappings of options.

    Raises:
        OptionError: something else, or a name that is there twice; all faults.

    >>> read_ways(["default", "fast", {"name": "ragged", "heads": "ragged"}, {"scope": "local"}])[2:]
    (Way(name='ragged', options={'heads': 'ragged'}), Way(name='scope=local', options={'scope': 'local'}))
    """
    if isinstance(ways, (str, Mapping)) or not isinstance(ways, Sequence) or not ways:
        expected = 'a list of presets\' names, "default", and mappings of options'
        raise OptionError("ways", expected, repr(ways)[:80], 'write ways=["default", "fast"]')
    faults, found = Faults(), dict[str, Way]()
    for one in ways:
        way = faults.attempt(_read, one)
        if way is not None and way.name in (*found, DENSE):
            remedy = 'name it with "name" in its mapping'
            faults.add(OptionError("ways", "a name of its own for every way", repr(way.name), remedy))
        elif way is not None:
            found[way.name] = way
    faults.throw()
    return tuple(found.values())


def _read(one: object) -> Way:
    if isinstance(one, Mapping) and all(isinstance(key, str) for key in one):
        options = {key: value for key, value in one.items() if key != "name"}
        name = one.get("name", ", ".join(f"{key}={value}" for key, value in options.items()) or DEFAULT)
        if isinstance(name, str) and name:
            return Way(name, options)
    if isinstance(one, str) and (one == DEFAULT or one in PRESETS):
        return Way(one, {} if one == DEFAULT else {"preset": one})
    expected = f'"{DEFAULT}", a preset ({", ".join(PRESETS)}), or a mapping of options with a name'
    raise OptionError("ways", expected, repr(one)[:80], 'write "fast", or {"name": "mine", "scope": "local"}')
