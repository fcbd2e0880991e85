"""An adapter in several safetensors files with an index: which tensor is in which file. What a client sent is data."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UpdateError

# Transformers gives an adapter's index the name of a model's: model.add_adapter(…), model.save_pretrained(max_shard_size=…).
INDICES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_NUMBERED = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
_MOST_BYTES, _MOST_FILES = 16 << 20, 1000


def find_shards(folder: Path, client: str) -> dict[str, set[str]]:
    """Find the files of an adapter that was saved in shards.

    Args:
        folder: the folder.
        client: the client's name in errors.

    Returns:
        File name → the keys that the index says it holds; empty if the adapter is not in shards.

    Raises:
        UpdateError: numbered files without their index, or an index that is too large, names what is no file of the folder,
            or does not name all of the folder's numbered files.
    """
    numbered = {file.name for file in folder.iterdir() if _NUMBERED.fullmatch(file.name)}
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is None:
        if numbered:
            raise UpdateError(f"{client}: {folder} has {min(numbered)}, but no index ({INDICES[0]}); send it too")
        return {}
    if not numbered and index.name != INDICES[0]:
        return {}  # a model's own index, beside an adapter that is elsewhere
    shards: dict[str, set[str]] = {}
    for key, name in _read_weight_map(index, client).items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise UpdateError(f"{client}: {index} puts {key} in {name!r}; name a safetensors file of the same folder")
        shards.setdefault(name, set()).add(key)
    if len(shards) > _MOST_FILES:
        raise UpdateError(f"{client}: {index} names {len(shards)} files; save the adapter in at most {_MOST_FILES}")
    for name in sorted(shards):
        file = folder / name
        if not file.is_file():
            raise UpdateError(f"{client}: {folder} lacks {name}, which {index.name} names; send all shards")
        if file.resolve().parent != folder.resolve():
            raise UpdateError(f"{client}: {file} is a link out of its folder; put the file itself there")
    if others := sorted(numbered - shards.keys()):
        raise UpdateError(
            f"{client}: {folder} has {others[0]}, which {index.name} does not name; remove what is left of an earlier save"
        )
    return shards


def _read_weight_map(index: Path, client: str) -> dict[str, Any]:
    if index.stat().st_size > _MOST_BYTES:
        raise UpdateError(f"{client}: {index} is larger than {_MOST_BYTES} bytes; send the index that was saved")
    try:
        content = json.loads(index.read_text("utf-8"), object_pairs_hook=_refuse_repeated)
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"{client}: {index} is not an index in JSON ({error}); send it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UpdateError(f"{client}: {index} has no weight_map of tensors to files; send the index that was saved")
    return weight_map


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name} is there more than once")
    return values


def check_shard(name: str, held: set[str], listed: set[str], client: str) -> None:
    """Raise UpdateError unless a shard holds exactly the tensors that the index lists for it.

    Args:
        name: the file's path.
        held: the keys in the file.
        listed: the keys that the index puts there.
        client: the client's name in errors.
    """
    if missing := sorted(listed - held):
        raise UpdateError(f"{client}: {name} lacks {missing[0]}, which the index puts there; save the adapter again")
    if extra := sorted(held - listed):
        raise UpdateError(f"{client}: {name} has {extra[0]}, which the index does not put there; save the adapter again")
