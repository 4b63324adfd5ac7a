"""Models on the Hugging Face Hub, through ``huggingface_hub``, which transformers brings along."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import AttnPruneError, CheckpointError, OptionError
from ..values.hub_names import HUB_NAME
from .card import CARD, is_free
from .folder import NAME, Folder
from .hf import CONFIG, GENERATION, INDEX
from .manifest import MANIFEST
from .save import save_model
from .source import Source

if TYPE_CHECKING:
    from ..report.report import Report

_FIRST = (MANIFEST, CONFIG, GENERATION, INDEX, "adapter_config.json")
"""What says which files of weights there are."""
_OLD = ("*.safetensors", INDEX, "pytorch_model*")
"""What a model that is sent leaves no use for."""


def name_of(directory: str | os.PathLike[str]) -> str | None:
    """The name on the Hub of a model that lies in the Hub's cache; None of one that lies elsewhere."""
    return Folder(Path(directory)).hub_name


def fetched(
    name: str,
    *,
    beside: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory in the Hub's cache that holds a model: its JSON files and its weights in safetensors.

    Args:
        name: ``"owner/model"``.
        beside: names of other files to have, where there are any.
        revision: a branch, a tag or a commit; None: the main branch.
        token: of a user; None: the one that is stored on this machine; False: none.
        cache_dir: where files are kept; None: where ``huggingface_hub`` keeps them.

    Raises:
        CheckpointError: there is no such model or revision, it cannot be reached, or ``huggingface_hub`` is missing.
    """
    hub = _huggingface_hub()
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    with _told(name, "a model of the Hub, or a directory", "check the name, the revision, the token and the network"):
        first = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(_FIRST), **options))
        files = [one for one in Source.at(first).files if NAME.fullmatch(one)]
        wanted = [*_FIRST, *beside, *files]
        return Path(hub.snapshot_download(name, revision=first.name, allow_patterns=wanted, **options))


def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    report: Report | None = None,
    card: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload a model pruned by attnprune",
    max_shard_size: int | str = "5GB",
) -> str:
    """Saves a model as :func:`attnprune.save_pruned` does, and sends it to the Hugging Face Hub in one commit.

    :func:`attnprune.from_pretrained` loads it by its name. Other files of the repository stay, tokenizers and
    processors among them (``processor.push_to_hub(name)`` sends those); weights that were there go. A model card that
    somebody has written stays as well.

    Args:
        model: pruned or not.
        name: ``"owner/model"``; the repository is made if it is not there, and stays if sending then fails.
        report: what pruning reported; its figures are then in the model card.
        card: entries for the YAML head of the model card, such as ``{"license": "apache-2.0"}``.
        private: whether a repository made here is private; None: as the owner's settings say.
        token: of a user who may write; None: the one that is stored on this machine.
        revision: the branch; None: the main one.
        create_pr: whether to open a pull request instead of writing to the branch.
        message: of the commit.
        max_shard_size: as in :func:`attnprune.save_pruned`.

    Returns:
        The address of the commit.

    Raises:
        OptionError: not such a name.
        CheckpointError: the Hub refuses it or cannot be reached, or ``huggingface_hub`` is missing.
        AttnPruneError: as in :func:`attnprune.save_pruned`; nothing is sent then.

    Example::

        report = attnprune.prune_attention(model, 0.5, data=clips)
        attnprune.push_to_hub(model, "me/ast-half", report=report, card={"license": "bsd-3-clause"})
        model = attnprune.from_pretrained("me/ast-half")
    """
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise OptionError("name", "an owner and a model of the Hub", repr(name)[:80], 'write "me/my-model"')
    hub = _huggingface_hub()
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "model"), Path(place, "cache")
        save_model(model, folder, max_shard_size=max_shard_size, report=report, card=card, name=name)
        with _told(name, "a repository that takes the model", "check the name, the token and its right to write"):
            api = hub.HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            if not _card_is_free(api, name, revision, cache):
                (folder / CARD).unlink()
            sent = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr,
                delete_patterns=list(_OLD),
            )  # fmt: skip
    return str(sent.commit_url)


def _card_is_free(api: Any, name: str, revision: str | None, cache: Path) -> bool:
    """Whether a repository has no card, or one that nobody has made their own."""
    from huggingface_hub import errors

    try:
        return is_free(Folder(Path(api.hf_hub_download(name, CARD, revision=revision, cache_dir=cache)).parent))
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        return True


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "the Hub", "huggingface_hub", "none", 'install it: pip install "attnprune[hub]"'
        ) from error
    return huggingface_hub


@contextmanager
def _told(where: str, expected: str, remedy: str) -> Iterator[None]:
    """What ``huggingface_hub`` raises, as an error of attnprune."""
    try:
        yield
    except (AttnPruneError, MemoryError):
        raise
    except Exception as error:  # of HTTP, of files, of its own: whatever it is, it names the model
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = ": ".join([type(error).__name__, " ".join(lines)[:300]])
        raise CheckpointError(where, expected, found, remedy) from error
