"""A pruned model as a directory: bit-exact, in every shape, by every way in."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attnprune
from attnprune import (
    export_stock,
    find_attention,
    from_pretrained,
    load_pruned,
    prune_attention,
    prune_heads,
    save_pruned,
)
from attnprune.checkpoint import tensors
from attnprune.checkpoint.manifest import Manifest
from attnprune.checkpoint.skeleton import places
from attnprune.checkpoint.source import Source
from attnprune.checkpoint.tensors import DTYPES, Weights
from attnprune.errors import CheckpointError, OptionError, StateDictError, WrappedModelError
from attnprune.families.registry import all_views

from .conformance import close, family, fresh, inputs
from .families import FAMILIES
from .processes import forked, in_processes
from .selection import examples, spread, telling

DATA = Path(__file__).parent / "data" / "model_v1"
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"scope": "local"},
    "decoupled": {},
    "ragged": {"heads": "ragged", "split": "auto"},
    "heads": {"granularity": "head"},
    "joint": {"granularity": "joint", "heads": "ragged"},
    "rotated": {"basis": "rotated", "compensate": False},
    "compensated": {"basis": "rotated", "compensate": True, "heads": "ragged"},
}


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


def pruned(name: str, case: int, way: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    model, options = fresh(name, case), {"ratios": {"qk": 0.5, "vo": 0.25} if way == "decoupled" else 0.5, **WAYS[way]}
    ratios = options.pop("ratios")
    if options.get("compensate"):
        options["data"] = [{key: getattr(x, "detach", lambda x=x: x)() for key, x in inputs(name, case).items()}]
    prune_attention(model, ratios, scorer="random", seed=seed, progress=False, **options)
    return model.to(dtype)


@pytest.mark.parametrize("name", telling(FAMILIES))
def test_round_trip_is_bit_exact(name: str, tmp_path_factory: Any) -> None:
    """Into a dense model with other weights, into one without any, and once more after another pruning."""
    cases = len(family(name).cases())
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    sizes = st.sampled_from(["5GB", 3000, "1KB"])

    @settings(max_examples=examples(10), deadline=None)
    @given(st.integers(0, cases - 1), st.sampled_from(sorted(WAYS)), dtypes, sizes, st.booleans(), st.integers(0, 99))
    def check(case: int, way: str, dtype: torch.dtype, size: Any, meta: bool, seed: int) -> None:
        model, folder = pruned(name, case, way, dtype, seed), tmp_path_factory.mktemp("saved")
        save_pruned(model, folder, max_shard_size=size)
        dense = fresh(name, case)
        if meta and not any(True for module in dense.modules() if module._non_persistent_buffers_set):
            dense = dense.to("meta")
        again = load_pruned(folder, dense)
        assert again is dense
        same(model, again)
        assert find_attention(again) == find_attention(model)
        if dtype == torch.float64:
            given_ = inputs(name, case, seed)
            found, expected = (family(name).run(one, given_).detach() for one in (again, model))
            close(found, expected, 0, "output")
        prune_attention(again, 0.3, scorer="random", heads="ragged")
        save_pruned(again, folder)
        same(again, load_pruned(folder, fresh(name, case)))
        assert sorted(path.suffix for path in folder.iterdir()).count(".safetensors") == 1
        assert not list(folder.glob("*.draft"))

    check()


def _load_families(rank: int, folder: str, jobs: list[tuple[str, str, int, int]]) -> None:
    found = {}
    for name, way, case, i in jobs:
        one = family(name)
        dense = one.build(**one.cases()[case])
        for parameter in dense.parameters():
            parameter.data.fill_(7)
        model = load_pruned(f"{folder}/{name}-{way}", dense)
        given_ = None if i % 3 else one.run(model, inputs(name, case, i)).detach()
        found[f"{name}-{way}"] = model.state_dict(), given_
    torch.save(found, f"{folder}/out.pt")


@forked
@pytest.mark.long
def test_another_process_loads_every_family_and_way(tmp_path: Path) -> None:
    """Into dense models with other weights, built there; equal in all bits, and in what they give."""
    kinds = [torch.float64, torch.float32, torch.bfloat16]
    expected, jobs = {}, []
    for i, (name, way) in enumerate(spread(FAMILIES, WAYS)):
        case = i % len(family(name).cases())
        model = pruned(name, case, way, kinds[i % 3], i)
        save_pruned(model, tmp_path / f"{name}-{way}", max_shard_size=("5GB", 3000)[i % 2])
        given = inputs(name, case, i)
        found = None if i % 3 else family(name).run(model, given).detach()
        expected[f"{name}-{way}"] = (model.state_dict(), found)
        jobs.append((name, way, case, i))
    in_processes(1, _load_families, str(tmp_path), jobs)
    loaded = torch.load(tmp_path / "out.pt")
    assert loaded.keys() == expected.keys()
    for key, (state, given) in expected.items():
        again, found = loaded[key]
        assert list(again) == list(state), key
        assert all(torch.equal(value, again[one]) and value.dtype == again[one].dtype for one, value in state.items())
        assert given is None or torch.equal(found, given), key


def vit(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
    more = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**sizes, **more, **config})).eval()


PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PIXELS).logits  # type: ignore[no-any-return]


def _load_directories(rank: int, folder: str) -> None:
    found = {}
    for path in sorted(Path(folder).glob("*/*")):
        model = from_pretrained(path)
        found[path.parent.name, path.name] = logits(model), model.state_dict(), model.training
    torch.save(found, f"{folder}/out.pt")


@forked
def test_another_process_loads_hugging_face_models_from_their_directories_alone(tmp_path: Path) -> None:
    """Every kind of plan, by both ways to save, equal in all bits and outputs."""
    models = {}
    for way in WAYS:
        models[way] = model = vit()
        options = {"data": [PIXELS], "progress": False} if way == "compensated" else {}
        prune_attention(model, {"qk": 0.5, "vo": 0.25} if way == "decoupled" else 0.5, **{**WAYS[way], **options})
        save_pruned(model, tmp_path / way / "ours", max_shard_size="5KB")
        model.save_pretrained(tmp_path / way / "theirs")
    in_processes(1, _load_directories, str(tmp_path))
    loaded = torch.load(tmp_path / "out.pt")
    assert len(loaded) == 2 * len(WAYS)
    for (way, _), (found, state, training) in loaded.items():
        assert torch.equal(found, logits(models[way]))
        assert not training
        assert list(state) == list(models[way].state_dict())
        assert all(torch.equal(value, state[key]) for key, value in models[way].state_dict().items())


def test_directories_of_version_1_load() -> None:
    """Written by an earlier attnprune; what is in them, safetensors' own reader says."""
    layer = load_pruned(DATA / "layer", nn.TransformerEncoderLayer(16, 4, 8))
    for folder, model in ((DATA / "layer", layer), (DATA / "vit", from_pretrained(DATA / "vit"))):
        expected = load_file(next(folder.glob("*.safetensors")))
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    said = json.loads((DATA / "vit/attnprune.json").read_text())["attention"]
    assert [list(spec.qk_dims) for spec in find_attention(model)] == [one["spec"]["qk_dims"] for one in said]


def test_directories_of_version_2_load_and_are_saved_by_the_names_of_today(tmp_path: Path) -> None:
    """Up to version 3 files of weights were named by their digests."""
    folder = tmp_path / "old"
    shutil.copytree(DATA.parent / "model_v2", folder)
    old = Manifest.read(folder)
    assert [one.name for one in old.shards] == [one.fresh for one in old.shards]
    model = from_pretrained(folder)
    expected = load_file(folder / old.shards[0].name)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    save_pruned(model, folder)
    same(model, from_pretrained(folder))
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_files_have_the_names_that_others_look_for(tmp_path: Path) -> None:
    """One file, or numbered ones and their index; what an earlier save left goes."""
    model = vit()
    prune_attention(model, 0.5)
    save_pruned(model, tmp_path, max_shard_size="4KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name in names for key in load_file(tmp_path / name)}
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in model.state_dict().values())
    save_pruned(model, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    export_stock(vit(), tmp_path)  # in place of it
    assert not (tmp_path / "attnprune.json").exists()
    same(vit(), from_pretrained(tmp_path))


def test_a_model_that_is_saved_anew_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manifest says and what is in the files belong together, digests unread: file names tell nothing."""
    models = [vit(), vit()]
    for model, share in zip(models, (0.25, 0.5), strict=True):
        prune_attention(model, share, scope="local")
    for when in ("before", "after"):
        save_pruned(models[0], tmp_path)
        opened, left = Weights.__init__, [1]

        def init(self: Any, folder: Any, names: Any, opened: Any = opened, left: Any = left, when: str = when) -> None:
            if left and when == "before":
                left.clear()
                save_pruned(models[1], tmp_path)
            opened(self, folder, names)
            if left:
                left.clear()
                save_pruned(models[1], tmp_path)

        monkeypatch.setattr(Weights, "__init__", init)
        same(models[1], from_pretrained(tmp_path, verify=False))
        assert not left
        monkeypatch.undo()


def test_a_save_that_was_killed_before_files_had_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [vit(), vit()]
    for model, share in zip(models, (0.25, 0.5), strict=True):
        prune_attention(model, share, scope="local")
    save_pruned(models[0], tmp_path, max_shard_size="6KB")
    with monkeypatch.context() as patched:
        patched.setattr("attnprune.checkpoint.save.ending_with", lambda end: None)
        save_pruned(models[1], tmp_path, max_shard_size="6KB")
    same(models[1], from_pretrained(tmp_path))
    save_pruned(models[0], tmp_path)
    same(models[0], from_pretrained(tmp_path))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_weights_that_transformers_wrote_over_ours_are_named(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    save_pruned(model, tmp_path)
    vit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="if save_pretrained wrote it since, remove attnprune"):
        from_pretrained(tmp_path)


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """What we write, it reads, and the other way round, in every dtype."""
    holder = nn.Module()
    made = {f"x{i}": torch.randint(0, 2, (3, i + 1)).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    for key, value in {**made, "empty": torch.zeros(0, 4), "one": torch.tensor(7.0)}.items():
        holder.register_buffer(key, value)
    save_pruned(holder, tmp_path / "ours")
    theirs = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    for key, value in holder.state_dict().items():
        assert theirs[key].dtype == value.dtype
        assert torch.equal(theirs[key].view(torch.uint8), value.view(torch.uint8)) if value.dim() else True
    model = vit()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "again").mkdir()
    save_file(load_file(tmp_path / "dense/model.safetensors"), tmp_path / "again/model.safetensors")
    (tmp_path / "again/config.json").write_bytes((tmp_path / "dense/config.json").read_bytes())
    same(model, from_pretrained(tmp_path / "again"))


def test_weights_are_split_by_size_and_each_file_has_its_digest(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    manifest = Manifest.read(save_pruned(model, tmp_path, max_shard_size="4KB"))
    sizes = [(tmp_path / one.name).stat().st_size for one in manifest.shards]
    assert len(sizes) > 2
    assert sizes == [one.size for one in manifest.shards]
    files = [load_file(tmp_path / one.name) for one in manifest.shards]
    for one in files:
        assert len(one) == 1 or sum(x.nbytes for x in one.values()) <= 4000
    assert sorted(key for one in files for key in one) == sorted(model.state_dict())
    save_pruned(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    for wrong in (0, -1, "5 parsecs", "", True, None, 1.5):
        with pytest.raises(OptionError, match="max_shard_size"):
            save_pruned(model, tmp_path, max_shard_size=wrong)  # type: ignore[arg-type]


def test_the_report_goes_along(tmp_path: Path) -> None:
    model = vit()
    report = prune_attention(model, 0.5)
    manifest = Manifest.read(save_pruned(model, tmp_path, report=report))
    assert manifest.report == json.loads(json.dumps(report.to_dict()))
    assert manifest.model_class.endswith("ViTForImageClassification")
    assert Manifest.read(save_pruned(model, tmp_path)).report is None


def test_device_and_dtype(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    save_pruned(model.half(), tmp_path)
    again = from_pretrained(tmp_path)
    assert next(again.parameters()).dtype == torch.float16
    assert not any(module.training for module in again.modules())
    wide = from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert all(torch.equal(p, wide.state_dict()[key].half()) for key, p in model.state_dict().items())
    with pytest.raises(OptionError, match="dtype"):
        from_pretrained(tmp_path, dtype=torch.int8)


def test_loading_never_holds_a_dense_copy(tmp_path: Path) -> None:
    """The largest tensor ever made is one of the pruned model's; parameters begin on the meta device."""
    model = vit(hidden_size=96, intermediate_size=8, image_size=8, patch_size=4)
    prune_attention(model, 0.9, scope="local")
    save_pruned(model, tmp_path)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(x.nbytes for x in (out,) if isinstance(x, torch.Tensor) and not x.is_meta)
            return out

    with Watch():
        again = from_pretrained(tmp_path)
    same(model, again)
    assert max(made) <= max(p.nbytes for p in model.parameters()) < 96 * 96 * 4


# transformers' own save_pretrained


@pytest.mark.parametrize("options", [{"heads": "ragged"}, {"scope": "local"}, {"granularity": "head"}])
def test_save_pretrained_of_a_pruned_model_loads_again(options: dict[str, Any], tmp_path: Path) -> None:
    model, config = vit(), None
    config = model.config
    twin = transformers.ViTForImageClassification(config)
    prune_attention(model, 0.5, **options)
    assert twin.config is config
    assert not hasattr(config, "attnprune")  # shared configs of other models do not change
    assert model.config is model.vit.config is model.vit.layers[0].attention.config
    model.save_pretrained(tmp_path / "one")
    again = from_pretrained(tmp_path / "one")
    same(model, again)
    assert torch.equal(logits(model), logits(again))
    assert find_attention(again) == find_attention(model)
    prune_attention(again, 0.3, heads="ragged")
    again.save_pretrained(tmp_path / "two", max_shard_size="5KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    third = from_pretrained(tmp_path / "two")
    same(again, third)
    save_pruned(third, tmp_path / "three")
    from_pretrained(tmp_path / "three").save_pretrained(tmp_path / "four")
    same(again, from_pretrained(tmp_path / "four"))
    same(again, load_pruned(tmp_path / "two", vit()))


def test_a_base_model_saved_on_its_own_loads(tmp_path: Path) -> None:
    """Its config is the one of the head, whose names begin with the base's."""
    model = transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=20, dim=24, n_layers=1, n_heads=4, hidden_dim=12)
    )
    prune_attention(model, 0.5, heads="ragged")
    model.distilbert.save_pretrained(tmp_path)
    same(model.distilbert, from_pretrained(tmp_path))


def clip() -> Any:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 12,
            "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19}  # fmt: skip
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))


def test_composite_models_keep_their_parts_configs_together(tmp_path: Path) -> None:
    model = clip()
    prune_attention(model, 0.5, heads="ragged")
    assert model.config.text_config is model.text_model.config
    model.save_pretrained(tmp_path / "both")
    same(model, from_pretrained(tmp_path / "both"))
    save_pruned(model, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    same(model, again)
    x = {"input_ids": torch.randint(0, 18, (2, 6)), "pixel_values": PIXELS}
    with torch.no_grad():
        assert torch.equal(model(**x).logits_per_image, again(**x).logits_per_image)  # buffers that no file holds too


def test_a_dense_directory_gives_the_dense_model(tmp_path: Path) -> None:
    model = vit().half()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    again = from_pretrained(tmp_path)
    same(model, again)
    assert not hasattr(again.config, "attnprune")
    keywords = Path(__file__).parents[1] / "examples/keywords/checkpoint"
    expected = transformers.ASTForAudioClassification.from_pretrained(keywords)
    same(expected, from_pretrained(keywords))


def test_dense_models_that_generate_merge_tensors_or_come_with_more_than_they_need(tmp_path: Path) -> None:
    text = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    )
    text.generation_config.max_new_tokens = 7
    text.save_pretrained(tmp_path / "text")
    again: Any = from_pretrained(tmp_path / "text")
    same(text, again)
    assert again.generation_config.max_new_tokens == 7
    save_pruned(text, tmp_path / "ours")
    plan = attnprune.make_plan(text, 0.5)
    attnprune.apply_to_checkpoint(tmp_path / "text", plan, tmp_path / "streamed")
    for folder in ("ours", "streamed"):
        assert from_pretrained(tmp_path / folder).generation_config.max_new_tokens == 7
    experts = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    )  # fmt: skip
    experts.save_pretrained(tmp_path / "experts")  # each expert by itself; the model holds them in one tensor
    same(experts, from_pretrained(tmp_path / "experts"))
    config = tmp_path / "experts/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 1 << 18}))
    with pytest.raises(CheckpointError, match="a model of about"):
        from_pretrained(tmp_path / "experts")
    model = vit()
    model.save_pretrained(tmp_path / "more")
    file = tmp_path / "more/model.safetensors"
    save_file({**load_file(file), "another.head.weight": torch.ones(3)}, file)
    same(model, from_pretrained(tmp_path / "more"))


def test_an_error_in_a_commit_leaves_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before = model.config
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plan = attnprune.make_plan(model, 0.5)

    def fail(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attnprune.api.OptimizerPatch.commit", fail)
    with pytest.raises(KeyboardInterrupt):
        attnprune.apply_plan(model, plan, optimizer=optimizer)
    assert model.config is before
    assert all(module.config is before for module in model.modules() if hasattr(module, "config"))
    assert not hasattr(before, "attnprune")


# what is particular


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=12)  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    prune_attention(model, 0.5, heads="ragged")
    again: Any = from_pretrained(save_pruned(model, tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs")
    for one in (again, from_pretrained(tmp_path / "theirs")):
        same(model, one)
        assert one.cls.predictions.decoder.weight is one.bert.embeddings.word_embeddings.weight

    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both[1].weight = both[0].weight
    assert len(load_file(next(save_pruned(both, tmp_path / "two").glob("*.safetensors")))) == 3
    loaded = load_pruned(tmp_path / "two", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta"))
    same(both, loaded)
    assert loaded[0].weight is loaded[1].weight  # type: ignore[index]


def test_a_skeleton_on_the_meta_device_needs_its_buffers(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    model = Model()
    prune_attention(model, 0.5)
    save_pruned(model, tmp_path)
    with torch.device("meta"):
        skeleton = Model()
    with pytest.raises(CheckpointError, match=r"table.*meta"):
        load_pruned(tmp_path, skeleton)
    assert type(skeleton.attention) is nn.MultiheadAttention
    skeleton.table = torch.arange(3.0)
    same(model, load_pruned(tmp_path, skeleton))


def test_parameters_of_a_model_with_data_stay_the_same_objects(tmp_path: Path) -> None:
    model, other = vit(), vit()
    prune_attention(model, 0.5)
    save_pruned(model.half(), tmp_path)
    norm = other.vit.layernorm.weight
    norm.requires_grad_(False)
    load_pruned(tmp_path, other)
    assert other.vit.layernorm.weight is norm
    assert norm.dtype == torch.float16
    assert not norm.requires_grad


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"more": 1}

    with pytest.raises(OptionError, match="_extra_state"):
        save_pruned(Extra(2, 2), tmp_path / "a")
    computed = torch.nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    with pytest.raises(WrappedModelError):
        save_pruned(nn.Sequential(computed), tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="directory"):
        save_pruned(nn.Linear(2, 2), tmp_path / "file")
    assert not (tmp_path / "a").exists()


def test_a_dense_state_dict_still_says_what_is_wrong(tmp_path: Path) -> None:
    model = nn.MultiheadAttention(16, 4)
    state = copy.deepcopy(model.state_dict())
    prune_heads(model, {0: [1]})
    with pytest.raises(StateDictError):
        load_pruned(save_pruned(model, tmp_path), nn.MultiheadAttention(16, 4)).load_state_dict(state)


def test_names_of_every_tensor(tmp_path: Path) -> None:
    """The walk by which models are read and filled finds what state dicts hold."""
    for name in FAMILIES:
        model = fresh(name, 0)
        assert list(places(model)) == list(model.state_dict())


def test_a_save_that_ends_anywhere_leaves_the_old_model_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first to the last thing that a save does to the disk: there the process dies, and does nothing more."""

    class Dead(BaseException):
        pass

    old, new = vit(), vit()
    prune_attention(old, 0.25, scope="local")
    prune_attention(new, 0.5, scope="local")
    save_pruned(old, tmp_path / "before", max_shard_size="9KB")
    ends: list[bool] = []
    for last in range(500):
        folder, left = tmp_path / f"{last}", last
        shutil.copytree(tmp_path / "before", folder)

        def dying(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Dead
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (tensors, "_write")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save_pruned(new, folder, max_shard_size="9KB")
                done = True
            except Dead:
                done = False
        found = from_pretrained(folder)
        ends.append(found.vit.layers[0].attention.q_proj.out_features == 12)  # type: ignore[union-attr, index]
        same(new if ends[-1] else old, found)
        save_pruned(old, folder)
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".md", ".safetensors"]
        if done:
            break
    assert done
    assert len(ends) > 20
    assert ends == sorted(ends)  # once the new one is there, it stays
    assert ends[0] is False
    assert ends[-2:] == [True, True]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    """Configs of state space models hold infinity, which transformers writes as a mapping."""
    torch.manual_seed(0)
    config = transformers.BambaConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    model, ids = transformers.BambaModel(config).eval(), torch.randint(0, 30, (2, 5))
    prune_attention(model, 0.5, include="layers.1.*")
    again: Any = from_pretrained(save_pruned(model, tmp_path / "bamba"))
    assert again.config.time_step_limit[1] == float("inf")
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(transformers, "GraniteSWAConfig"), reason="transformers 5.24 has it")
def test_a_scale_of_ones_own_under_rotary_embeddings_that_run_expanded(tmp_path: Path) -> None:
    """Granite multiplies logits with 1, which is no head dim's scale."""
    torch.manual_seed(0)
    config = transformers.GraniteSWAConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model, ids = transformers.GraniteSWAModel(config).eval(), torch.randint(0, 30, (2, 5))
    report = prune_attention(model, 0.5)
    assert any(way.startswith("expanded") for way in report.ways.values())
    assert find_attention(model)[0].scale == 1
    again: Any = from_pretrained(save_pruned(model, tmp_path / "granite"))
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "options", [{"scope": "local", "heads": "uniform"}, {"heads": "ragged"}, {"granularity": "head"}], ids=str
)
def test_what_only_a_run_shows_is_in_the_file(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments of Swin's attention tell too little, so that loading cannot find out how it may run."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4
    )
    model, x = transformers.SwinModel(config).eval(), torch.randn(2, 3, 32, 32)
    prune_attention(model, 0.5, example_inputs=x, **options)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (save_pruned(model, tmp_path / "ours"), tmp_path / "theirs"):
        monkeypatch.setattr("attnprune.families.proof.verdict._KNOWN", {})  # as in another process
        again: Any = from_pretrained(folder)
        assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)
        assert torch.equal(again(x).pooler_output, model(x).pooler_output)  # which holds no weights
        again_pruned = prune_attention(again, 0.2, example_inputs=x, scorer="random", heads="ragged")
        assert again_pruned.verified is not None
    manifest = json.loads((tmp_path / "ours" / "attnprune.json").read_text())
    manifest["attention"][0]["way"] = "somehow"
    raw = json.dumps(manifest)
    (tmp_path / "ours" / "attnprune.json").write_text(raw)
    monkeypatch.setattr("attnprune.families.proof.verdict._KNOWN", {})
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path / "ours")


def deberta() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.DebertaConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16,
        max_position_embeddings=16, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    return transformers.DebertaModel(config), {"input_ids": torch.randint(0, 30, (2, 6))}


def bloom() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.BloomConfig(vocab_size=30, hidden_size=24, n_layer=2, n_head=3)
    return transformers.BloomModel(config), {"input_ids": torch.randint(0, 30, (2, 6))}


@pytest.mark.parametrize("make", [bloom, deberta])
def test_the_order_that_only_a_run_shows_is_in_the_file(
    make: Callable[[], tuple[Any, dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q, K and V lie head by head in one projection; taken for three blocks they would be another model's."""
    torch.manual_seed(0)
    model, given = make()
    for parameter in model.eval().parameters():
        parameter.data.normal_(std=0.3)
    with torch.no_grad():
        model(**given)  # some make tables at their first call
        prune_attention(model, 0.5, example_inputs=given, heads="ragged")
        fixed = [view.fixed for view in all_views(model)]
        folder = save_pruned(model, tmp_path)
        monkeypatch.setattr("attnprune.families.proof.verdict._KNOWN", {})  # as in another process
        again: Any = from_pretrained(folder)
        assert torch.equal(again(**given)[0], model(**given)[0])
        assert [view.fixed for view in all_views(again)] == fixed
    manifest = json.loads((folder / "attnprune.json").read_text())
    for change in ({"order": "qkv d h"}, {"order": 3}, {"heads": ["somehow"]}, {"fixed": 3}, {"fixed": {"x": "y"}}):
        other = copy.deepcopy(manifest)
        other["attention"][0]["seen"] |= change
        (folder / "attnprune.json").write_text(json.dumps(other))
        monkeypatch.setattr("attnprune.families.proof.verdict._KNOWN", {})
        with pytest.raises(CheckpointError):
            from_pretrained(folder)


def test_masks_on_the_meta_device_hide_nothing(tmp_path: Path) -> None:
    """GPT-Neo keeps its causal mask in a buffer, and does not scale its logits; with nothing to attend to, both would
    be of no matter, and its own forward seem to run smaller heads."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=30, hidden_size=24, num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]],
        window_size=4, intermediate_size=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = transformers.GPTNeoModel(config).eval(), torch.randint(0, 30, (2, 6))
    skeleton = copy.deepcopy(model).to("meta")
    assert [one.verdict.stock for one in all_views(skeleton)] == [one.verdict.stock for one in all_views(model)]  # type: ignore[union-attr]
    prune_attention(model, 0.4, scope="local")
    again: Any = from_pretrained(save_pruned(model, tmp_path))
    assert torch.equal(again(ids)[0], model(ids)[0])


def test_data_parallel_is_saved_as_the_module_inside(tmp_path: Path) -> None:
    """Into one again, and into a plain model."""
    model, given = nn.DataParallel(fresh("ViT", 0)), inputs("ViT", 0)
    prune_attention(model, 0.5, heads="ragged")
    folder = save_pruned(model, tmp_path)
    same(model.module, from_pretrained(folder))
    for target in (fresh("ViT", 0), nn.DataParallel(fresh("ViT", 0))):
        found = load_pruned(folder, target)
        assert found is target
        inner = found.module if isinstance(found, nn.DataParallel) else found
        same(model.module, inner)
        expected = family("ViT").run(model.module, given)
        torch.testing.assert_close(family("ViT").run(inner, given), expected, rtol=0, atol=0)


def test_a_save_that_fails_removes_no_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have written to the directory that this one made."""
    where = tmp_path / "model"

    def failing(*_: Any) -> str:
        (where / "other.txt").write_text("theirs")
        raise OSError("disk full")

    monkeypatch.setattr("attnprune.checkpoint.save.write_tensors", failing)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(nn.MultiheadAttention(16, 4), where)
    assert [path.name for path in where.iterdir()] == ["other.txt"]
    monkeypatch.setattr("attnprune.checkpoint.save.write_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pruned(nn.MultiheadAttention(16, 4), tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_a_model_that_is_saved_anew_while_it_is_read(tmp_path: Path) -> None:
    """What was said first no longer holds when the weights are opened; then what is said by now does."""
    first, second = (nn.MultiheadAttention(16, 4) for _ in range(2))
    prune_attention(second, 0.5)
    source = Source.at(save_pruned(first, tmp_path, max_shard_size="1KB"))
    save_pruned(second, tmp_path)
    assert not any((tmp_path / name).exists() for name in source.files), "several files before, one now"
    with source.opened(verify=True) as (found, weights):
        assert found.manifest == Source.at(tmp_path).manifest
        assert weights.entries["q_proj.weight"].shape == (8, 16)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="safetensors"), Source.at(tmp_path).opened():
        pass  # nothing new is said
