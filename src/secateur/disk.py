"""Directories that appear whole or not at all, and the hash of a file."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def refuse(out: str | Path, force: bool = False, way: str = "choose another directory") -> None:
    """Say so where something is in the way of a directory; an empty one is not.

    Args:
        force: it is to be replaced.
        way: out of it.

    Raises:
        OutputError: there is.
    """
    target = Path(out)
    if not force and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists: {way}")


@contextmanager
def beside(out: str | Path, force: bool = False) -> Iterator[Path]:
    """A new directory next to ``out``, which takes its place when the block ends; nothing is left where it fails.

    Raises:
        OutputError: ``out`` exists, is not empty, and is not to be replaced (``force``); or it cannot be written.
    """
    target = Path(out)
    refuse(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from None
    part.chmod(0o755)
    try:
        yield part
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
