"""Files that are either whole or absent, and their fingerprints."""

import contextlib
import csv
import filecmp
import hashlib
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

MANIFEST = "manifest.json"  # the last file of a step, .../steps/<step>/<key>/: what lies there is finished
METADATA = "metadata.jsonl"  # captions of the images beside and below it, as Hugging Face's ImageFolder has them


def temporary_beside(path: Path) -> Path:
    """Return a hidden name beside `path`, with its suffix, that no other process has: their numbers are not unique over
    containers. It is short, as `path` may have the longest name that is allowed."""
    return path.with_name(f".{uuid.uuid4().hex[:16]}.tmp{path.suffix}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an exception.

    A reader therefore never sees half a file, and a failed write leaves nothing behind. A file that has the same bytes
    already stays as it is; so does, with a warning, one of a finished step that would get others. The temporary name
    keeps the suffix, because image libraries choose the format by it. The file's mode follows the umask, whichever mode
    the library that writes gives it (safetensors: 0600). durable: on the disk when the block is left, so that a power
    failure does not lose it. Raises an OSError before the block begins where nothing can be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        temporary.touch()  # the umask cannot be read without setting it for all threads
        mode = temporary.stat().st_mode
        temporary.unlink()  # a block that writes nothing is an error
        yield temporary
        temporary.chmod(mode)
        if path.is_file():
            if filecmp.cmp(temporary, path, shallow=False):
                return
            if step := finished_step(path):
                kept = f"{step} is finished and keeps its files, of which this call would write others"
                warnings.warn(f"{kept}; remove the folder to make the step anew.", stacklevel=3)
                return
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; move its content there when the block ends without an exception.

    So an interrupted or failed command leaves none of its files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder) as temporary:
        yield Path(temporary)
        for path in Path(temporary).iterdir():
            path.rename(folder / path.name)


def write_text(path: str | os.PathLike, text: str, durable: bool = False) -> None:
    """Write a text in UTF-8, as `atomic_path` does."""
    with atomic_path(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finished_step(path: Path) -> Path | None:
    """Return the folder of the finished step that a path lies in, if any."""
    folders = (folder for folder in path.parents if folder.parent.parent.name == "steps")
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def sync(path: Path) -> None:
    """Have a file's or a folder's content written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, every cell a text."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping], columns: Sequence[str] = ()) -> None:
    """Write rows as a CSV file with a header (`columns`; else the first row's keys); whole or not at all."""
    rows = list(rows)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sha256_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
