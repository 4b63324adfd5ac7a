"""Thousands of broken directories and plans: each loads right or raises an AttnPruneError. ``make fuzz`` runs 10,000.

A case is a directory that was saved well and then changed: bits, lengths, JSON values, headers, names, links. It must
not raise anything else, take over a second, hold 100 MB more than its files, or touch anything outside its directory.
What loads in spite of a change has the values of the weights as they were, unless the weights themselves were changed
where no digest covers them, and then it is at least complete. ``--kills`` kills a process that saves over and over.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnprune import Plan, from_pretrained, load_pruned, make_plan, prune_attention, save_pruned
from attnprune.checkpoint.entry import digest_of
from attnprune.errors import AttnPruneError

SECONDS, BYTES = 1.0, 100 << 20
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 1 << 20, (1 << 31) - 1, 1 << 40, 1 << 63, 1 << 100, 1.5, 1e-320, 1e308,
    "", "x", "..", "../outside", "/etc/passwd", "model.safetensors", "a" * 5000, "\0", [], [[]], {}, {"a": 1},
    [1, 2, 3], ["x"] * 9, [0] * 5000, {"__float__": "Infinity"}, "float32", "load", "os", "ViTModel", "BertModel",
    "AutoModel", "F64", "I8",
)  # fmt: skip
TEXTS = (
    "", "{", "[", "null", "NaN", "{}", "[]", '"x"', "[" * 5000, '{"a":' * 3000, "9" * 6000, "1e999", "\ufeff{}",
    "{'a': 1}", '{"a": 1, "a": 2}', "[" + "0," * 100_000 + "0]", "[" + "{}," * 100_000 + "{}]",
    "\ud800".encode("utf-8", "surrogatepass"),
)  # fmt: skip


class Base(NamedTuple):
    """A directory as it was saved."""

    name: str
    files: dict[str, bytes]
    load: Callable[[Path, bool], nn.Module]
    state: dict[str, Tensor]
    covered: bool
    """Whether digests cover the weights."""


def vit() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
                                    image_size=16, patch_size=8, num_labels=5)  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def bases(root: Path) -> list[Base]:
    """One directory of each kind."""
    import transformers

    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    layer, ragged, dense = nn.TransformerEncoderLayer(16, 4, 8), vit(), vit()
    prune_attention(layer, 0.5, heads="ragged", scorer="random")
    report = prune_attention(ragged, {"qk": 0.5, "vo": 0.25}, heads="ragged")
    save_pruned(layer, root / "layer", max_shard_size="1KB")
    save_pruned(ragged, root / "ours", report=report)
    ragged.save_pretrained(root / "theirs", max_shard_size="6KB")
    dense.save_pretrained(root / "dense")
    old = Path(__file__).parent / "data/model_v1/layer"
    shutil.copytree(old, root / "old")

    def into(path: Path, verify: bool) -> nn.Module:
        return load_pruned(path, nn.TransformerEncoderLayer(16, 4, 8), verify=verify)

    def built(path: Path, verify: bool) -> nn.Module:
        return from_pretrained(path, verify=verify)

    found = []
    for name, load, covered in (
        ("layer", into, True), ("ours", built, True), ("theirs", built, False), ("dense", built, False),
        ("old", into, True),
    ):  # fmt: skip
        files = {path.name: path.read_bytes() for path in (root / name).iterdir()}
        state = load(root / name, True).state_dict()
        found.append(Base(name, files, load, state, covered))
        shutil.rmtree(root / name)
    return found


# changes


def flip(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(rng: random.Random, data: bytes) -> bytes:
    where = rng.randrange(len(data) + 1)
    return rng.choice((data[:where], data[where:], data + rng.randbytes(rng.randrange(1, 99)), data[:where] * 2, b""))


def noise(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.choice((1, 8, 9, 100, 5000)))


def edit(rng: random.Random, value: Any) -> Any:
    """One place of a JSON value, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        act = rng.random()
        if act < 0.08:
            return {one: each for one, each in value.items() if one != key}
        if act < 0.12:
            return {(one + "x" if one == key else one): each for one, each in value.items()}
        if act < 0.15:
            return {**value, rng.choice(("more", "auto_map", "quantization_config", "head_dim")): rng.choice(ODD)}
        return {**value, key: edit(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i, act = rng.randrange(len(value)), rng.random()
        if act < 0.1:
            return value[:i] + value[i + 1 :]
        if act < 0.2:
            return value[:i] + [value[i]] + value[i:]
        return [*value[:i], edit(rng, value[i]), *value[i + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 1 << 33, -value * 2))
    return rng.choice(ODD)


def _parsed(data: bytes) -> Any:
    """A JSON value; the empty mapping where an earlier change left none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return {}


def edit_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.15:
        text = rng.choice(TEXTS)
        return text if isinstance(text, bytes) else text.encode()
    found = edit(rng, _parsed(data))
    if isinstance(found, dict) and "sha256" in found and rng.random() < 0.7:  # as somebody who means harm would
        whole = {key: value for key, value in found.items() if key != "sha256"}
        found = {**whole, "sha256": digest_of(whole)}
    entry = found.get("attnprune") if isinstance(found, dict) else None
    if isinstance(entry, dict) and "attention" in entry and rng.random() < 0.7:
        entry["sha256"] = digest_of(entry["attention"])
    text = json.dumps(found)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = '{"version": 2,' + text[1:]
    return text.encode()


def edit_header(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return rng.choice((0, 1, size + 1, 1 << 30, 1 << 62, (1 << 64) - 1)).to_bytes(8, "little") + data[8:]
    text = json.dumps(edit(rng, _parsed(data[8 : 8 + size]))).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def change(rng: random.Random, folder: Path, outside: Path) -> str:
    """Changes a directory; returns what was done."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    name = rng.choice(names)
    path = folder / name
    weights = [one for one in names if one.endswith(".safetensors")]
    act = rng.random()
    if act < 0.05:
        path.unlink()
        other: Callable[[], Any] = rng.choice((
            lambda: path.symlink_to(outside), lambda: path.symlink_to(rng.choice(names)), lambda: os.mkfifo(path),
            path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: None,
        ))  # fmt: skip
        other()
        return "replaced"
    if act < 0.10 and len(weights) > 1:
        one, two = rng.sample(weights, 2)
        (folder / one).rename(folder / "spare")
        (folder / two).rename(folder / one)
        (folder / "spare").rename(folder / two)
        return "swapped"
    kinds: list[Callable[[random.Random, bytes], bytes]] = [flip, cut, noise]
    kinds += [edit_header] * 4 if name in weights else [edit_json] * 6
    kind = rng.choice(kinds)
    path.write_bytes(kind(rng, path.read_bytes() or b"{}"))
    return kind.__name__


# running


class Watch:
    """Notes what is opened, connected or started outside a case's directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.inside, self.seen = str(root), "", []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: Any) -> None:
        if not self.inside:
            return
        if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.seen.append(event)
        if event == "open" and isinstance(args[0], str):
            path = os.path.abspath(args[0])
            writes = isinstance(args[1], str) and any(mode in args[1] for mode in "wax+")
            elsewhere = not path.startswith(self.inside + os.sep)
            if elsewhere and (writes or path.startswith(self.root) or path in ("/etc/passwd", "/dev/zero")):
                self.seen.append(f"open {path}")


def memory(key: str) -> int:
    """Bytes, from the system's account of this process; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def reset_peak() -> None:
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def well_formed(base: Base, model: nn.Module, same_bytes: bool) -> str:
    """Empty, or what is wrong with a model that loaded."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in (*state.values(), *(b for _, b in model.named_buffers()))):
        return "a tensor without data"
    if same_bytes:
        for key, tensor in state.items():
            expected = base.state.get(key, base.state.get(f"vit.{key}"))  # its config may say that it is a base model
            if expected is None or expected.shape != tensor.shape or not torch.equal(expected, tensor):
                return f"{key} has other values"
    return ""


def run(cases: int, seed: int = 0, show: bool = False) -> tuple[collections.Counter[str], list[str], float, int]:
    """Runs cases; returns how they ended, what went wrong, and the longest time and largest memory of a case."""
    ends: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        known = bases(root)
        plans = [make_plan(vit(), 0.5, basis=basis).to_json().encode() for basis in ("channels", "rotated")]
        outside = root / "outside"
        outside.write_bytes(known[0].files["attnprune.json"])
        watch = Watch(root)
        for number in range(cases):
            rng = random.Random(f"{seed}-{number}")
            base, folder = rng.choice(known), root / "case"
            folder.mkdir()
            is_plan, verify = rng.random() < 0.15, rng.random() < 0.7
            what: list[str] = []
            if is_plan:
                text = rng.choice(plans)
                kind = rng.choice((flip, cut, noise, edit_json, edit_json, edit_json))
                text, what = kind(rng, text), [kind.__name__]
            else:
                for key, data in base.files.items():
                    (folder / key).write_bytes(data)
                what = [change(rng, folder, outside) for _ in range(rng.choice((1, 1, 1, 2)))]
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink())
            reset_peak()
            before, start = memory("VmRSS"), time.perf_counter()
            watch.inside, problem = str(folder), ""
            try:
                if is_plan:
                    found = Plan.from_json(text)
                    end = "loaded"
                    Plan.from_json(found.to_json())
                else:
                    model = base.load(folder, verify)
                    end = "loaded"
            except AttnPruneError as error:
                end = type(error).__name__
                problem = "a message of over 1500 characters" if len(str(error)) > 1500 else ""
            except BaseException as error:  # what must not happen
                if show:
                    traceback.print_exc()
                end = problem = f"{type(error).__name__}: {str(error)[:200]}"
            watch.inside = ""
            seconds, taken = time.perf_counter() - start, max(memory("VmHWM") - before - size, 0)
            slowest, largest = max(slowest, seconds), max(largest, taken)
            if not problem and seconds > SECONDS:
                problem = f"{seconds:.1f} s"
            if not problem and taken > BYTES:
                problem = f"{taken >> 20} MB"
            if not problem and watch.seen:
                problem = f"outside: {watch.seen[:3]}"
            if not problem and end == "loaded" and not is_plan:
                kept = {key: data for key, data in base.files.items() if key.endswith(".safetensors")}
                now = {path.name: path.read_bytes() for path in folder.glob("*.safetensors") if path.is_file()}
                problem = well_formed(base, model, (base.covered and verify) or kept == now)
            watch.seen.clear()
            if problem:
                wrong.append(
                    f"case {seed}-{number} ({'plan' if is_plan else base.name}, {what}, verify={verify}): {problem}"
                )
            ends[end.split(":")[0]] += 1
            shutil.rmtree(folder)
            if show and (number + 1) % 1000 == 0:
                print(f"{number + 1} cases, {len(wrong)} wrong", flush=True)
        if outside.read_bytes() != known[0].files["attnprune.json"] or sorted(root.iterdir()) != [outside]:
            wrong.append("something outside the directories was changed")
    return ends, wrong, slowest, largest


def kill(times: int, seed: int = 0) -> tuple[collections.Counter[str], list[str]]:
    """Kills a process that saves, at random moments; returns which model was there each time, and what went wrong."""
    rng = random.Random(seed)
    models = {}
    for share in (0.25, 0.5):
        models[str(share)] = model = vit()
        prune_attention(model, share, scope="local")
    states = {name: model.state_dict() for name, model in models.items()}
    found: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        save_pruned(models["0.25"], folder, max_shard_size="6KB")
        once = time.perf_counter() - start
        for number in range(times):
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        for model in models.values():
                            save_pruned(model, folder, max_shard_size="6KB")
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, 12 * once))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            try:
                state = from_pretrained(folder).state_dict()
            except BaseException as error:
                wrong.append(f"kill {number}: {type(error).__name__}: {error}")
                continue
            equal = [key for key, one in states.items() if _equal(one, state)]
            if len(equal) != 1:
                wrong.append(f"kill {number}: the model is neither of the two")
            found.update(equal)
        save_pruned(models["0.5"], folder)
        left = sorted(path.suffix for path in folder.iterdir())
        if left != [".json", ".json", ".md", ".safetensors"]:
            wrong.append(f"left behind: {left}")
    return found, wrong


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    there, wrong = kill(args.kills, args.seed)
    print(f"{args.kills} kills: loaded {dict(there)}, {len(wrong)} wrong", flush=True)
    ends, more, slowest, largest = run(args.cases, args.seed, show=True)
    for line in (*wrong, *more)[:50]:
        print(line)
    print(f"{args.cases} cases: {dict(ends.most_common())}; {len(more)} wrong")
    print(f"slowest {slowest:.3f} s, most memory beyond the files {largest / 2**20:.1f} MB")
    sys.exit(bool(wrong or more))


if __name__ == "__main__":
    main()
