"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder to fill, which gets its name only if nothing goes wrong.

    Raises:
        FileExistsError: the path exists.
    """
    path = Path(path)
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file through a temporary one beside it, which takes its place only if nothing goes wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if the path exists: results never overwrite anything."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another output folder or remove it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
