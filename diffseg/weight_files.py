"""Look at the files of a generator or a LoRA before anything is loaded, so that an error names the file.

Loaders say little of a damaged file, and some say nothing: transformers makes an empty tokenizer of an empty folder.
Only headers are read here, so a check of many gigabytes takes a moment.
"""

import json
import re
from pathlib import Path

from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open

from diffseg.errors import DiffsegError

LFS = b"version https://git-lfs"  # the first bytes of what git leaves in place of a large file
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # formats that can run code when they are read


def get_online(error: Exception) -> str:
    """Return what to do about an error of the hub: some repositories want a licence accepted."""
    if isinstance(error, GatedRepoError):
        return "accept its licence on its page of the hub and log in with `hf auth login`"
    return "go online once"


def check_file(path: Path) -> None:
    """Raise a DiffsegError when a file is a Git LFS pointer, or a .json or .safetensors that is not whole."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise DiffsegError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder.")
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the header's offsets with the file's size
                pass
    except (ValueError, SafetensorError) as error:
        size = path.stat().st_size
        raise DiffsegError(f"{path} is damaged ({size} bytes: {error}); copy or download it again.") from error


def check_pipeline_folder(folder: Path, variant: str = "") -> None:
    """Raise a DiffsegError when a folder in diffusers' layout lacks a part, or holds one that is damaged.

    variant: the word in the names of the weights' files, as in `model.fp16.safetensors`; "": none.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise DiffsegError(
            f"{folder} has no model_index.json; give the folder of a whole pipeline in diffusers' layout, as "
            "save_pretrained writes it."
        )
    check_file(index)
    parts = {
        name: value
        for name, value in json.loads(index.read_text(encoding="utf-8")).items()
        if isinstance(value, list) and value[0] is not None and name not in ("safety_checker", "feature_extractor")
    }
    has_variant = False
    for name, (_, kind) in parts.items():
        if not (folder / name).is_dir():
            raise DiffsegError(f"{folder} lacks the folder {name} that its model_index.json names; download it again.")
        for path in sorted((folder / name).iterdir()):
            if path.is_file() and path.suffix not in PICKLES:
                check_file(path)
        if (folder / name / "config.json").is_file():
            has_variant |= check_weights(folder / name, variant)
        elif "Tokenizer" in kind:
            check_tokenizer(folder / name)
    if variant and not has_variant:
        raise DiffsegError(
            f"{folder} has no weights of the variant {variant!r}; set generator_variant to one in its files' names, or "
            "leave it empty."
        )


def check_weights(folder: Path, variant: str) -> bool:
    """Return whether a model's folder has weights of `variant`; raise a DiffsegError when it has none that load.

    Where a variant is asked for and absent, the plain weights serve, as with diffusers.
    """
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    # a name is stem[-00001-of-00002][.variant].safetensors, or with the variant before the number
    variants = {name.split(".")[1].split("-")[0] if name.count(".") > 1 else "" for name in found}
    if not found:
        pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        what = f"holds {pickled[0]} but no .safetensors" if pickled else "holds no .safetensors"
        raise DiffsegError(
            f"{folder} {what}; only safetensors are read: save the pipeline again with save_pretrained(..., "
            "safe_serialization=True), or choose another copy of the model."
        )
    if not variants & {variant, ""}:
        names = ", ".join(sorted(variants))
        raise DiffsegError(f"{folder} has weights of the variant {names} only; set generator_variant={names}.")
    for index in folder.glob("*.safetensors.index*.json"):  # of weights in several files
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        wanted = "" if index.name.endswith(".index.json") else index.name.split(".")[-2]
        if wanted == variant and (lost := sorted(shards - found.keys())):
            raise DiffsegError(f"{folder / lost[0]} is missing, which {index.name} names; copy or download it again.")
    return variant in variants


def check_tokenizer(folder: Path) -> None:
    """Raise a DiffsegError when a tokenizer's folder has no vocabulary, or a damaged file."""
    if not any(path for name in ("tokenizer.json", "vocab.json", "vocab.txt", "*.model") for path in folder.glob(name)):
        raise DiffsegError(f"{folder} holds no vocabulary (tokenizer.json, vocab.json); copy or download it again.")
    for path in sorted(folder.iterdir()):
        check_file(path)


def check_hub_id(name: str) -> None:
    """Raise a DiffsegError unless `name`, which is no path that exists, could be a hub's id."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DiffsegError(f"{name} does not exist and is no hub id such as owner/name; check the spelling.")
