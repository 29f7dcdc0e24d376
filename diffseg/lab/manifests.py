"""Manifests: what a finished step was made from and by what, and whether its files are still there as they were.

`manifest.json` is written last and stays small; the files are listed beside it in `outputs.csv`, one row each with
size, time of modification and sha256. A file counts as unaltered while size and time are those of the listing; only a
file whose time differs, as after a copy, is hashed again.
"""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.files import MANIFEST, atomic_path, sha256_file, sha256_text, write_text

LISTING = "outputs.csv"


def read_json(path: Path) -> dict | None:
    """Return the object in a JSON file, None where there is no file; one that cannot be read raises DiffsegError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DiffsegError(f"{path} cannot be read ({error}); restore it, or remove its folder.") from None
    if not isinstance(value, dict):
        raise DiffsegError(f"{path} holds no JSON object; restore it, or remove its folder.")
    return value


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the manifest of a step's folder, None where there is none; one that is not whole raises DiffsegError."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if manifest is not None and not {"step", "key", "parameters", "outputs"} <= manifest.keys():
        raise DiffsegError(f"{path} is no step's manifest; restore it, or remove its folder.")
    return manifest


def write_manifest(folder: Path, names: Iterable[str], content: dict[str, Any]) -> dict[str, Any]:
    """Hash the named files of a step, write the listing and then the manifest; return the manifest."""
    rows = []
    for name in sorted(names):
        stat = (folder / name).stat()
        rows.append((name, stat.st_size, stat.st_mtime_ns, sha256_file(folder / name)))
    with atomic_path(folder / LISTING, durable=True) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "bytes", "modified_ns", "sha256"))
        writer.writerows(rows)
    manifest = content | {"outputs": {"count": len(rows), "sha256": fingerprint((row[0], row[3]) for row in rows)}}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", durable=True)
    return manifest


def fingerprint(files: Iterable[tuple[str, str]]) -> str:
    """Return one sha256 over the names and sha256 of several files; when they were written does not count."""
    return sha256_text("".join(f"{name}\0{sha}\n" for name, sha in files))


def read_listing(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, int, str]]:
    """Return name -> (bytes, time of modification in ns, sha256) of a finished step's files.

    Raises DiffsegError when the listing is not the manifest's, or names a file outside the folder.
    """
    try:
        with open(folder / LISTING, encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        found = {name: (int(size), int(modified), sha) for name, size, modified, sha in rows}
    except (OSError, ValueError) as error:
        raise DiffsegError(f"{folder / LISTING} cannot be read ({error}); restore it, or remove {folder}.") from None
    if fingerprint((name, sha) for name, (_, _, sha) in found.items()) != manifest["outputs"]["sha256"]:
        raise DiffsegError(f"{folder / LISTING} is not the listing of its manifest; restore it, or remove {folder}.")
    if outside := [name for name in found if os.path.isabs(name) or ".." in Path(name).parts]:
        raise DiffsegError(f"{folder / LISTING} names {outside[0]}, which lies outside {folder}; remove that folder.")
    return found


def damage(folder: Path, manifest: dict[str, Any], verify: bool = False) -> tuple[list[str], list[str]]:
    """Return the files of a finished step that are missing, and those that are altered; verify: hash all of them."""
    missing, altered = [], []
    for name, (size, modified, sha) in read_listing(folder, manifest).items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            missing.append(name)
            continue
        as_listed = stat.st_size == size and stat.st_mtime_ns == modified and not verify
        if not as_listed and (stat.st_size != size or sha256_file(path) != sha):
            altered.append(name)
    return missing, altered
