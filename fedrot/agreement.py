"""Whether clients that send bare state dicts train under one LoRA configuration: each sends a digest of its own."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .adapters.config import plain_config
from .adapters.meaning import digest
from .admission import make_one_line
from .errors import UpdateError

Digest = Mapping[str, str]

_LONGEST, _MOST_FIELDS = 200, 40


def write_digest(config: Any) -> str:
    """Write what a LoRA configuration makes factors mean, as a text of at most a few thousand characters.

    Args:
        config: a ``peft.LoraConfig`` or the content of an adapter_config.json.
    """
    return json.dumps(digest(plain_config(config)), ensure_ascii=False)


def read_digest(text: Any, name: str) -> Digest:
    """Read what a client sent as its digest, which may be anything.

    Raises:
        UpdateError: not what ``write_digest`` writes.
    """
    try:
        read = json.loads(text) if isinstance(text, str) and len(text) <= _LONGEST * _MOST_FIELDS else None
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict) or len(read) > _MOST_FIELDS or not all(isinstance(x, str) for x in read.values()):
        raise UpdateError(f"{name} sent a digest of its LoRA configuration that fedrot does not write; use one version")
    return read


def explain_difference(mine: Digest, other: Digest, whose: str) -> str | None:
    """Words for the first field in which two digests differ, or None. Fields that one of them lacks do not count."""
    for field, value in mine.items():
        if value != other.get(field, value):
            told, theirs = make_one_line(value, _LONGEST), make_one_line(other[field], _LONGEST)
            return (
                f"has {make_one_line(field, _LONGEST)} = {told} in its LoRA configuration, but {whose} has {theirs}: their "
                "factors do not mean the same; all clients must use one LoRA configuration"
            )
    return None


def find_unlike(digests: Mapping[str, Digest]) -> dict[str, str]:
    """Find the clients whose digests differ from the most frequent one.

    Args:
        digests: client → its digest, of clients that sent one. Of several that are equally frequent, that of the first
            client counts.

    Returns:
        Client → why its update cannot be averaged with the others.
    """
    if not digests:
        return {}
    texts = {name: json.dumps(dict(found), sort_keys=True) for name, found in digests.items()}
    most = Counter(texts.values()).most_common(1)[0][0]
    leader = next(name for name, text in texts.items() if text == most)
    found = {name: explain_difference(theirs, digests[leader], leader) for name, theirs in digests.items()}
    return {name: why for name, why in found.items() if why is not None}
