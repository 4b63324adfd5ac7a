"""Directories that nobody vouches for: what is wrong in them is said, and nothing else happens."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnprune import from_pretrained, load_pruned, prune_attention, read_report, save_pruned
from attnprune.checkpoint.entry import digest_of
from attnprune.checkpoint.folder import Folder
from attnprune.errors import AttnPruneError, CheckpointError

from .test_checkpoint import same, vit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.TransformerEncoderLayer(16, 4, 8)
    prune_attention(model, 0.5, heads="ragged", scorer="random")
    return save_pruned(model, tmp_path / "saved", max_shard_size="1KB")


def refused(folder: Path, **options: Any) -> CheckpointError:
    """Loading raises, and the model it was to go into is as it was."""
    dense = nn.TransformerEncoderLayer(16, 4, 8)
    before, kind = copy.deepcopy(dense.state_dict()), type(dense.self_attn)
    with pytest.raises(CheckpointError) as caught:
        load_pruned(folder, dense, **options)
    assert type(dense.self_attn) is kind
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert len(str(caught.value)) < 1000
    return caught.value


def write(path: Path, manifest: dict[str, Any]) -> None:
    """A manifest whose own digest is right, as somebody who means harm would write it."""
    whole = {key: value for key, value in manifest.items() if key != "sha256"}
    path.write_text(json.dumps({**whole, "sha256": digest_of(whole)}))


def test_altered_manifests_are_refused(saved: Path) -> None:
    path = saved / "attnprune.json"
    good = json.loads(path.read_text())
    shard, others, spec = good["weights"][0], good["weights"][1:], good["attention"][0]["spec"]

    def attention(**change: Any) -> dict[str, Any]:
        one = good["attention"][0]
        return {"attention": [{**one, "spec": {**spec, **change.pop("spec", {})}, **change}]}

    def weights(**change: Any) -> dict[str, Any]:
        return {"weights": [{**shard, **change}, *others]}

    changes: tuple[dict[str, Any], ...] = (
        {"format": "pickle"}, {"version": 3}, {"version": 0}, {"version": True}, {"version": 1}, {"extra": 1},
        {"class": 3}, {"config": 3}, {"report": []}, {"tied": []}, {"tied": {"a": 1}}, {"weights": "../x"},
        {"weights": {}}, {"weights": []}, {"weights": [shard]}, {"weights": good["weights"] * 2}, {"weights": [1]},
        weights(name="/etc/passwd"), weights(name="../" + shard["name"]), weights(name=3),
        weights(name="model-0000000000000000.safetensors"), weights(sha256="0" * 64), weights(sha256="x"),
        weights(size=-1), weights(size=1.5), weights(size=True),
        {"attention": {}}, {"attention": [1]},
        {"attention": good["attention"] * 2}, attention(kept=[0, 1]), attention(kept=[3, 2, 1, 0]),
        attention(kept=[0, 1, 2, 9]), attention(kept=[0, 0, 1, 2]), attention(spec={"name": "other"}),
        attention(spec={"qk_dims": [9, 1, 1, 1]}), attention(spec={"qk_dims": [1 << 30] * 4}),
        attention(spec={"scale": -1.0}), attention(spec={"d_model": None}), attention(spec={"d_model": 17}),
        attention(spec={"bias": [False] * 4}), attention(spec={"qk_dims": [2, 2, 2, 1]}),
    )  # fmt: skip
    for change in changes:
        write(path, {**good, **change})
        refused(saved)
    path.write_text(json.dumps({**good, "class": "another"}))
    assert "changed" in str(refused(saved))
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    for text in (
        "", "{", "[]", "null", "[" * 100_000, '{"format": 1, "format": 2}', "[" + "1" * 5000 + "]", '{"version": NaN}',
        '{"version": 1e999}', "\\x00", json.dumps({**good, "report": {"a": nested}}), "[" + "0," * (1 << 21) + "0]",
    ):  # fmt: skip
        path.write_text(text)
        refused(saved)
    path.write_bytes(b"\xff\xfe\x00" * 9)
    refused(saved)


def test_altered_weights_are_refused(saved: Path) -> None:
    path = sorted(saved.glob("*.safetensors"))[0]
    good = path.read_bytes()
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    data = good[8 + int.from_bytes(good[:8], "little") :]

    def with_header(**change: Any) -> bytes:
        text = json.dumps({**header, **change}).encode()
        return len(text).to_bytes(8, "little") + text + data

    first = next(key for key in header if key != "__metadata__")
    one = header[first]
    assert "SHA-256" in str(refused_with(path, good[:-1] + bytes([good[-1] ^ 1])))
    start, stop = one["data_offsets"]
    for raw in (
        good[:-1], good + b"\0", good[:9], b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + good[8:],
        (0).to_bytes(8, "little") + good[8:], with_header(more={"dtype": "F32", "shape": [], "data_offsets": [0, 4]}),
        with_header(**{first: {**one, "dtype": "F64"}}), with_header(**{first: {**one, "dtype": "F31"}}),
        with_header(**{first: {**one, "shape": [1 << 60] * 9}}), with_header(**{first: {**one, "shape": [-1]}}),
        with_header(**{first: {**one, "shape": [[1]]}}), with_header(**{first: {**one, "shape": [1] * 99}}),
        with_header(**{first: {**one, "data_offsets": [start + 1, stop + 1]}}), with_header(**{first: 1}),
        with_header(**{first: {**one, "data_offsets": [stop, start]}}), with_header(**{first: {**one, "more": 1}}),
        with_header(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),  # one more, of no bytes
    ):  # fmt: skip
        refused_with(path, raw, verify=False)
    path.write_bytes(good)
    other = sorted(saved.glob("*.safetensors"))[1]
    swapped = other.read_bytes()
    other.write_bytes(good)
    refused(saved, verify=False)  # tensors twice
    path.write_bytes(swapped)
    assert "SHA-256" in str(refused(saved))
    dense = nn.TransformerEncoderLayer(16, 4, 8)
    load_pruned(saved, dense, verify=False)  # the same tensors, in other files
    path.unlink()
    refused(saved, verify=False)


def refused_with(path: Path, raw: bytes, **options: Any) -> CheckpointError:
    path.write_bytes(raw)
    return refused(path.parent, **options)


def replacements(path: Path, outside: Path) -> list[Callable[[], None]]:
    """What may stand in a file's place."""
    return [
        lambda: path.symlink_to(outside),
        lambda: path.symlink_to(path.name + ".real"),
        lambda: path.symlink_to(path.name),  # to itself
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: None,
    ]


@pytest.mark.parametrize("theirs", [False, True], ids=["save_pruned", "save_pretrained"])
def test_links_pipes_and_directories_in_place_of_files_are_refused(theirs: bool, tmp_path: Path) -> None:
    model, folder = vit(), tmp_path / "saved"
    prune_attention(model, 0.5)
    if theirs:
        model.save_pretrained(folder, max_shard_size="5KB")
    else:
        save_pruned(model, folder)
    same(model, from_pretrained(folder))
    outside = tmp_path / "outside"
    used = [path for path in folder.iterdir() if theirs or path.name not in ("config.json", "README.md")]
    for path in used:
        real = path.rename(folder / f"{path.name}.real")
        outside.write_bytes(real.read_bytes())
        for replace in replacements(path, outside)[: -1 if path.name == "attnprune.json" else None]:
            replace()
            with pytest.raises(CheckpointError):
                from_pretrained(folder)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        if path.name == "attnprune.json":  # without it, config and weights are what save_pretrained writes
            same(model, from_pretrained(folder))
        real.rename(path)
    same(model, from_pretrained(folder))
    for wrong in (tmp_path / "nothing", outside, folder / used[0].name):
        with pytest.raises(CheckpointError, match="directory"):
            from_pretrained(wrong)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/b", "..", ".", "", ".hidden", "a\0b", "x" * 300, "ä"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError):
        Folder.at(tmp_path / "in").open(name)
    model = vit()
    prune_attention(model, 0.5)
    model.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    index = tmp_path / "in/model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][next(iter(found["weight_map"]))] = name
    index.write_text(json.dumps(found))
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path / "in")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    for other in (nn.TransformerEncoderLayer(16, 4, 9), nn.TransformerEncoderLayer(16, 4, 8, bias=False)):
        prune_attention(other, 0.5)
        refused(save_pruned(other, tmp_path / "other"))
    plain = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 8))
    prune_attention(plain, 0.5)
    refused(save_pruned(plain, tmp_path / "third"))


LEAD_ELSEWHERE: tuple[dict[str, Any], ...] = (
    {"architectures": ["os"]}, {"architectures": ["pipeline"]}, {"architectures": None}, {"architectures": []},
    {"architectures": ["__name__"]}, {"architectures": "ViTModel"}, {"architectures": ["PreTrainedModel"]},
    {"architectures": ["AutoModel"]}, {"hidden_size": "x"}, {"hidden_size": 1 << 40}, {"num_hidden_layers": 1 << 20},
    {"num_hidden_layers": 60_000}, {"num_labels": 1 << 30, "id2label": None}, {"image_size": 1 << 24},
    {"dtype": "load"}, {"dtype": ["float32"]}, {"torch_dtype": "save"}, {"num_attention_heads": 0},
    {"num_attention_heads": 5}, {"patch_size": 0}, {"hidden_act": "eval"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"backbone_config": {"use_pretrained_backbone": True}}, {"more": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]},
)  # fmt: skip


@pytest.mark.parametrize("theirs", [False, True], ids=["save_pruned", "save_pretrained"])
def test_configs_that_are_not_of_the_model_are_refused(theirs: bool, tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    if theirs:
        model.save_pretrained(tmp_path)
    else:
        save_pruned(model, tmp_path)
    path = tmp_path / ("config.json" if theirs else "attnprune.json")
    good = json.loads(path.read_text())
    for change in LEAD_ELSEWHERE:
        if theirs:
            path.write_text(json.dumps({**good, **change}))
        else:
            write(path, {**good, "config": {**good["config"], **change}})
        with pytest.raises(CheckpointError):
            from_pretrained(tmp_path)


def test_what_a_config_says_about_code_files_and_kernels_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these entries would make transformers run code, read another file or fetch something."""
    model = vit()
    prune_attention(model, 0.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    (tmp_path.parent / "evil.safetensors").write_bytes(b"")
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    more = {
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "transformers_weights": "../evil.safetensors",
        "_attn_implementation": "kernels-community/flash-attn", "attn_implementation": "kernels-community/flash-attn",
        "fusion_config": {"patch_embeddings": True}, "kernel_config": {"x": "y/z"}, "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "evil.Pipeline"}}, "_name_or_path": "../evil", "name_or_path": "../evil",
    }  # fmt: skip

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the network or another process was asked for")

    monkeypatch.setattr("socket.socket.connect", never)
    monkeypatch.setattr("subprocess.Popen", never)
    path.write_text(json.dumps({**good, **more}))
    again = from_pretrained(tmp_path)
    same(model, again)
    assert again.config._attn_implementation in ("sdpa", "eager")  # type: ignore[union-attr]
    path.write_text(json.dumps({key: value for key, value in {**good, **more}.items() if key != "attnprune"}))
    with pytest.raises(CheckpointError):  # a dense model of other shapes
        from_pretrained(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "../evil", "peft_type": "LORA"})
    )
    with pytest.raises(CheckpointError, match="adapter"):
        from_pretrained(tmp_path)


def test_an_altered_entry_in_the_config_is_refused(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5, heads="ragged")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    entry = good["attnprune"]
    one = entry["attention"][0]
    for change in (
        1, [], {}, {**entry, "version": 2}, {**entry, "sha256": "0" * 64}, {**entry, "attention": []},
        {**entry, "attention": [{**one, "spec": {**one["spec"], "scale": 1.0}}, *entry["attention"][1:]]},
        {"version": 1, "attention": [one], "sha256": digest_of([one])},
    ):  # fmt: skip
        path.write_text(json.dumps({**good, "attnprune": change}))
        with pytest.raises(CheckpointError):
            from_pretrained(tmp_path)


def test_without_a_config_a_model_is_asked_for(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 8)
    prune_attention(layer, 0.5)
    with pytest.raises(CheckpointError, match="model="):
        load_pruned(save_pruned(layer, tmp_path / "layer"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AttnPruneError, match="neither"):
        from_pretrained(tmp_path / "empty")


def test_a_class_that_transformers_lacks_is_not_imported(tmp_path: Path) -> None:
    """``class`` in the manifest is for people: another one changes nothing."""
    model = vit()
    prune_attention(model, 0.5)
    path = save_pruned(model, tmp_path) / "attnprune.json"
    write(path, {**json.loads(path.read_text()), "class": "os.system"})
    same(model, from_pretrained(tmp_path))
    assert isinstance(from_pretrained(tmp_path), transformers.ViTForImageClassification)


def test_an_altered_report_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """Where no config tells what the dense model was, the report does; the digest is made good each time."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 8), 3, enable_nested_tensor=False)
    report = prune_attention(model, 0.5, heads="ragged")
    save_pruned(model, tmp_path, report=report)
    good = json.loads((tmp_path / "attnprune.json").read_text())
    large = [(1 << 18) - 1] * 4
    for change in (
        {"layers": [{**one, "qk_dims": [large, large]} for one in good["report"]["layers"]]},
        {"layers": [{**one, "vo_dims": [large]} for one in good["report"]["layers"]]},
        {"layers": [{**one, "name": "other"} for one in good["report"]["layers"]]},
        {"layers": [{**one, "heads": None, "qk_dims": [[1], [1]]} for one in good["report"]["layers"]]},
        {"layers": [1]}, {"layers": None}, {"layers": [{}]}, {"layers": good["report"]["layers"] * 2},
        {"model_parameters": [1]}, {"model_parameters": [-1, 2]}, {"model_parameters": [1e9, 2]}, {"asked": [1]},
        {"how": {"round_to": "x"}}, {"macs": [1]}, {"macs": "no"}, {"notes": 3},
    ):  # fmt: skip
        write(tmp_path / "attnprune.json", {**good, "report": {**good["report"], **change}})
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"report|qk channels"):
            read_report(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()


def test_buffers_that_no_file_holds_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a config asks for beside the weights is looked at before it takes memory."""
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=10
    )
    model = transformers.LlamaModel(config)
    model.save_pretrained(tmp_path)
    assert len([*model.buffers()]), "frequencies of the rotary embedding"
    read = dict(from_pretrained(tmp_path, dtype=torch.float64).named_buffers())
    assert all(torch.equal(read[name], own) and read[name].dtype == own.dtype for name, own in model.named_buffers())
    monkeypatch.setattr("attnprune.checkpoint.load._ROOM", 8)
    with pytest.raises(CheckpointError, match="buffers of at most 8 bytes"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["__init__", "state_dict"])
def test_what_a_class_raises_is_said_of_the_config(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit().save_pretrained(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of theirs")

    monkeypatch.setattr(transformers.ViTForImageClassification, method, broken)
    with pytest.raises(CheckpointError, match=r"config\.json: expected a config of.*of theirs") as found:
        from_pretrained(tmp_path)
    assert isinstance(found.value.__cause__, ZeroDivisionError)


def test_digests_tell_what_headers_do_not(saved: Path) -> None:
    path = sorted(saved.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in str(refused(saved))
    load_pruned(saved, nn.TransformerEncoderLayer(16, 4, 8), verify=False)
