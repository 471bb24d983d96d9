"""Data sets on the hub: which files they have, and each brought here when it is needed. No code of theirs runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_image_finetune.data import shards
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.shard_index import Shard
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import Unreadable, read_json

if TYPE_CHECKING:
    from qwen_image_finetune.config import DataEntry

CONVERTED = "refs/convert/parquet"  # where the hub keeps what it made of data sets of other formats
_SPLITS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing"),
}  # fmt: skip


class Address(NamedTuple):
    """`hf://OWNER/NAME[/FOLDER][@REVISION]`."""

    repository: str
    folder: str
    revision: str | None


def address(path: str) -> Address:
    """What an hf:// address means.

    Raises:
        DataError: it has no owner and name.
    """
    name, _, revision = path.removeprefix("hf://").removeprefix("datasets/").partition("@")
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    if not owner or not repository:
        raise DataError(f"{path}: an address on the hub is hf://OWNER/NAME, with @REVISION if need be")
    return Address(f"{owner}/{repository}", folder.strip("/"), revision or None)


def hub_shards(entry: DataEntry, home: Path) -> list[Shard]:
    """The shards of a data set on the hub; none is loaded before something in it is opened.

    Args:
        home: folder that shards are brought to; what the hub said is kept there, so that a run needs no network.

    Raises:
        DataError: it is not there, cannot be reached, or has no files that are read.
    """
    place = address(entry.path)
    folder = home / place.repository.replace("/", "--")
    listing = _listing(place, folder / f"{(place.revision or 'main').replace('/', '--')}.json", entry.path)
    names = [name for name in listing["files"] if name.startswith(f"{place.folder}/" if place.folder else "")]
    names = of_split(names, entry.split, entry.path)
    found = []
    for name in names:
        here = folder / listing["commit"]
        shard = Shard(here, name, (place.repository, listing["commit"], name))
        shards.comes_from(shard.path, partial(_fetch, place.repository, listing["commit"], name, here))
        found.append(shard)
    return found


def of_split(names: Sequence[str], split: str, source: str) -> list[str]:
    """The files of a split: those with its word in their name, or all where no name has the word of any.

    Raises:
        DataError: there are only those of others.
    """
    words = _SPLITS.get(split, (split,))
    own = [name for name in names if _has(name, words)]
    if own or not any(_has(name, known) for name in names for known in _SPLITS.values()):
        return sorted(own or names)
    raise DataError(f"{source}: no file of the split {split!r}; there are {', '.join(sorted(names)[:8])}")


def _has(name: str, words: Sequence[str]) -> bool:
    return re.search(rf"(^|[^a-z])({'|'.join(map(re.escape, words))})([^a-z]|$)", name.lower()) is not None


def _listing(place: Address, kept: Path, source: str) -> dict[str, Any]:
    """{commit, files} of a repository, from the hub, or as it was said before where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        said = _files(api, place.repository, place.revision)
        if not said["files"] and place.revision is None:
            said = _files(api, place.repository, CONVERTED)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"{source}: no data set {place.repository} on the hub, or none that you may see "
                        "(hf auth login)") from error  # fmt: skip
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        try:
            return read_json(kept)
        except (OSError, Unreadable):
            raise DataError(f"{source}: the hub cannot be reached, and was not before ({error})") from error
    if not said["files"]:
        raise DataError(f"{source}: no .parquet, .arrow or .tar file in it, nor a version that the hub made; data sets "
                        "that come as a program are not read")  # fmt: skip
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps(said))
    return said


def _files(api: Any, repository: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        about = api.dataset_info(repository, revision=revision)
    except RevisionNotFoundError:
        return {"commit": None, "files": []}
    names = [each.rfilename for each in about.siblings or []]
    for endings in (shards.TABLES, (".tar",)):
        if found := [name for name in names if name.endswith(endings)]:
            return {"commit": about.sha, "files": found}
    return {"commit": about.sha, "files": []}


def _fetch(repository: str, commit: str, name: str, folder: Path) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hf_hub_download(repository, name, repo_type="dataset", revision=commit, local_dir=folder,
                        endpoint=constants.ENDPOINT)  # fmt: skip
    except HfHubHTTPError as error:
        raise shards.ShardError(f"{name} of {repository} cannot be loaded: {error}") from error
