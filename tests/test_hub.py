"""Models on the Hugging Face Hub: sent to and had from a stand-in of its HTTP interface; their cards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from torch import nn

import attnprune
from attnprune import (
    export_stock,
    from_pretrained,
    load_pruned,
    load_skeleton,
    prune_attention,
    push_to_hub,
    save_pruned,
)
from attnprune.cli import main
from attnprune.errors import CheckpointError, OptionError

from .hub import TOKEN, Hub, serving
from .test_checkpoint import same, vit

OURS = {"attnprune.json", "config.json", "model.safetensors", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(tmp_path / "cache") as found:
        yield found


def half(**config: Any) -> tuple[Any, Any]:
    model = vit(**config)
    return model, prune_attention(model, 0.5)


def uploaded(hub: Hub, name: str, folder: Path, branch: str = "main") -> str:
    return hub.commit(name, {path.name: path.read_bytes() for path in folder.iterdir()}, branch)


def test_a_model_that_was_sent_is_had_by_its_name(hub: Hub) -> None:
    model, report = half()
    address = push_to_hub(model, "me/half", report=report, token=TOKEN, card={"license": "bsd-3-clause"})
    assert address.startswith(f"{hub.address}/me/half/commit/")
    files = hub.files("me/half")
    assert files is not None
    assert files.keys() == OURS | {".gitattributes"}
    again: Any = from_pretrained("me/half", token=False)
    same(model, again)
    assert (again.name_or_path, again.config._name_or_path) == ("me/half", "me/half")
    assert not [line for line in hub.asked if "README" in line and "resolve/main" not in line]  # nothing but the model


def test_cards_say_what_was_removed_and_how_to_load(hub: Hub, tmp_path: Path) -> None:
    """With a head that is YAML, and that others' tools read."""
    model, report = half()
    model.config._name_or_path = "them/vit-dense"
    push_to_hub(model, "me/half", report=report, token=TOKEN, card={"license": "mit", "datasets": ["a/b: c", "#1"]})
    card = ModelCard((hub.files("me/half") or {})["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "attnprune", "tags": ["attnprune", "pruning", "vit"], "base_model": "them/vit-dense",
        "license": "mit", "datasets": ["a/b: c", "#1"],
    }  # fmt: skip
    assert str(report) in card.text
    assert 'attnprune.from_pretrained("me/half")' in card.text
    for made, said in (
        (model, "| `vit.layers.1.attention` | 4 | 3 | 3 |"),
        (vit(), "Plain transformers loads it too"),
        (nn.MultiheadAttention(16, 4), 'attnprune.load_pruned("saved", dense)'),
    ):
        assert said in (save_pruned(made, tmp_path / "saved") / "README.md").read_text(), said
    for wrong in ({"a b": 1}, {"x": float("nan")}, {"x": object()}):
        with pytest.raises(OptionError, match="card"):
            save_pruned(model, tmp_path / "wrong", card=wrong)
    assert not (tmp_path / "wrong").exists()


def test_cards_that_somebody_has_written_stay(hub: Hub, tmp_path: Path) -> None:
    model, _ = half()
    for words in ("mine", save_pruned(model, tmp_path)):
        if words == "mine":
            (tmp_path / "README.md").write_text("mine")
            hub.commit("me/half", {"README.md": b"mine", "vocab.txt": b"a", "pytorch_model.bin": b"old"})
        save_pruned(model, tmp_path)
        push_to_hub(model, "me/half", token=TOKEN)
    files = hub.files("me/half")
    assert files is not None
    assert files["README.md"] == (tmp_path / "README.md").read_bytes() == b"mine"
    assert files.keys() == OURS | {"vocab.txt"}  # weights that are of no use any more went, others' files did not
    (tmp_path / "README.md").unlink()
    save_pruned(model, tmp_path)
    export_stock(vit(), tmp_path)  # whose card it is not
    assert not (tmp_path / "README.md").exists()


def test_revisions_tokens_and_private_models(hub: Hub, tmp_path: Path) -> None:
    old, new = vit(), vit()
    prune_attention(old, 0.25)
    prune_attention(new, 0.5)
    first = uploaded(hub, "me/model", save_pruned(old, tmp_path / "old"))
    uploaded(hub, "me/model", save_pruned(new, tmp_path / "new", max_shard_size="4KB"))
    hub.private.add("me/model")
    for revision, model in ((None, new), (first, old), ("main", new)):
        same(model, from_pretrained("me/model", revision=revision, token=TOKEN, cache_dir=tmp_path / "mine"))
    assert (tmp_path / "mine" / "models--me--model").is_dir()
    for options, found in (
        ({"token": False}, "RepositoryNotFoundError"),
        ({"token": TOKEN, "revision": "v9"}, "RevisionNotFoundError"),
    ):
        with pytest.raises(CheckpointError, match=f"me/model: expected a model of the Hub.*{found}"):
            from_pretrained("me/model", **options)  # type: ignore[arg-type]
    hub.down = True  # what is here needs no Hub
    same(old, from_pretrained("me/model", revision=first, cache_dir=tmp_path / "mine"))
    with pytest.raises(CheckpointError, match="me/other: expected a model of the Hub, or a directory"):
        from_pretrained("me/other")


def test_dense_models_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """As transformers saves them; what is in the cache is read through its links, and only there."""
    vit().save_pretrained(tmp_path / "dense", max_shard_size="6KB")
    (tmp_path / "dense" / "extra.safetensors").write_bytes(b"of no use")
    uploaded(hub, "them/vit", tmp_path / "dense")
    model: Any = from_pretrained("them/vit")
    same(vit(), model)
    assert not [line for line in hub.asked if "extra" in line]
    prune_attention(model, 0.5)
    assert 'base_model: "them/vit"' in (save_pruned(model, tmp_path / "half") / "README.md").read_text()
    folder = Path(snapshot_download("them/vit"))
    same(vit(), load_pruned(folder))
    assert load_skeleton(folder).vit.layers[0].attention.q_proj.out_features == 24  # type: ignore[union-attr, index]
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "dense" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a file, found a link"):
        load_pruned(folder)


def test_what_can_not_be_sent_or_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = half()
    for name in ("half", "a/b/c", "../half", "", None):
        with pytest.raises(OptionError, match="name: expected an owner and a model of the Hub"):
            push_to_hub(model, name, token=TOKEN)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="me/half: expected a repository that takes the model"):
        push_to_hub(model, "me/half", token="hf_of_another")
    with pytest.raises(OptionError, match="revision: expected a name on the Hub"):
        from_pretrained(tmp_path, revision="main")
    with pytest.raises(CheckpointError, match="a model of the Hugging Face Hub is named owner/model"):
        from_pretrained(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_to_hub(model, "me/half"), lambda: from_pretrained("me/half")):
        with pytest.raises(CheckpointError, match=r'pip install "attnprune\[hub\]"'):
            call()


def test_the_command_line_takes_models_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    vit().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "vocab.txt").write_text("a b c")
    uploaded(hub, "them/vit", tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "them/vit", "--qkvo", ".5", "-o", "small", "--quiet"]) == 0
    assert set(os.listdir("small")) == OURS | {"vocab.txt"}
    assert 'base_model: "them/vit"' in Path("small/README.md").read_text()
    assert main(["inspect", "them/none"]) == 1
    assert "them/none: expected a model of the Hub, or a directory" in capsys.readouterr().err


@pytest.mark.parametrize("theirs", [False, True])
def test_plain_transformers_names_attnprune(theirs: bool, tmp_path: Path) -> None:
    """Before it builds the dense model, which it would fill with random numbers if that were asked for."""
    model, _ = half()
    if theirs:
        model.save_pretrained(tmp_path)
    else:
        save_pruned(model, tmp_path)
    dense = transformers.ViTForImageClassification
    for load, options in ((dense, {}), (transformers.AutoModel, {}), (dense, {"ignore_mismatched_sizes": True})):
        with pytest.raises(ValueError, match=r"attnprune\.from_pretrained"):
            load.from_pretrained(tmp_path, **options)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "vit"  # for tokenizers and processors
    assert model.config._attn_implementation == "sdpa"
    save_pruned(vit(), tmp_path)  # a dense model loads plainly, and so does what stock configs can say
    same(vit(), dense.from_pretrained(tmp_path))
    model = vit()
    prune_attention(model, 0.5, stock=True)
    export_stock(model, tmp_path)
    assert dense.from_pretrained(tmp_path).config.head_dim == 3


@pytest.mark.long
def test_composite_models_are_refused_in_parts_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 40}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    model: Any = transformers.CLIPModel(config)
    prune_attention(model, 0.5)
    for folder in (save_pruned(model, tmp_path / "ours"), tmp_path / "theirs"):
        if folder.name == "theirs":
            model.save_pretrained(folder)
        for cls in (transformers.CLIPModel, transformers.CLIPTextModel, transformers.CLIPVisionModel):
            with pytest.raises(ValueError, match=r"attnprune\.from_pretrained"):
                cls.from_pretrained(folder)
        same(model, from_pretrained(folder))


def test_directories_that_save_pruned_wrote_load_by_transformers_with_our_config(tmp_path: Path) -> None:
    from attnprune.integrations.auto import AttnPruneConfig

    model, _ = half()
    save_pruned(model, tmp_path)
    again: Any = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=AttnPruneConfig(), attn_implementation="eager"
    )
    same(model, again)
    assert again.config._attn_implementation == "eager"
    assert attnprune.find_attention(again) == attnprune.find_attention(model)
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"attnprune\.from_pretrained"):
        transformers.AutoModel.from_pretrained(tmp_path / "again")
