"""Guess what target images show, with a network that was trained on synthetic ones, as captions for LoRA tuning.

    python -m diffseg.experiments.pseudo_captions NETWORK --out results/data/street-captions --words rider=cyclist

One caption for all images ties the domain's look to the words of that caption. Step 3 draws class words, so the look
should come beside those, too. Nobody has said what is in which image, but the network of a run without tuning
(results/runs/NAME/04_robust_training/synthetic) has a prediction. Wrong captions cost something, as a randomly assigned
word does, so only the largest classes are named. No label is read. Our choice: the paper is silent on captions.
On mini Cityscapes the guesses are wrong too often: the score falls (`guessed` in results/tables/lora.csv).

The folder that comes out holds links to the images and metadata.jsonl with their captions, as Hugging Face's
ImageFolder has it: give it as target_images. Images in which the network finds nothing get the captions of all.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffseg.errors import DiffsegError
from diffseg.files import METADATA, atomic_path
from diffseg.inference import predict
from diffseg.paths import locate
from diffseg.segmenters import load_segmenter
from diffseg.target_domain import find_pictures
from diffseg.words import nfc, with_article


def largest_classes(label: np.ndarray, names: Sequence[str], share: float, most: int) -> list[str]:
    """Return the names of the `most` largest classes of a label map (ids, 0 = background), each of `share` at least.

    share: of the image's pixels, 0..1. The largest comes first; of two as large, the one with the smaller id.
    """
    pixels = np.bincount(label.ravel(), minlength=len(names))
    order = sorted(range(1, len(names)), key=lambda k: -pixels[k])
    return [names[k] for k in order[:most] if pixels[k] and pixels[k] >= share * label.size]


def write_captions(
    network: Path,
    pictures: Sequence[Path],
    folder: Path,
    template: str,
    words: Mapping[str, str],
    share: float,
    most: int,
    side: int,
) -> dict[str, str]:
    """Write links to the images and METADATA into a folder; return the captions by file name.

    template: with one `{}`, which takes "a bus and a car"; words: the word for a class where its name will not do;
    side: as in `predict`.
    Raises a DiffsegError for a class that the network does not know, a bad template, and two images of one name.
    """
    if template.count("{}") != 1:
        raise DiffsegError(f"the template {template!r} must hold {{}} once, where the classes come.")
    if len({path.name for path in pictures}) < len(pictures):
        raise DiffsegError(
            "two of the target images have the same file name; rename one, as they come into one folder."
        )
    segmenter = load_segmenter(network)
    if unknown := words.keys() - set(segmenter.classes):
        raise DiffsegError(
            f"the network knows no class {min(unknown)!r}; its classes are {', '.join(segmenter.classes)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for path in tqdm(pictures, "looking at images"):
        seen = largest_classes(*predict(segmenter, path, side), share, most)
        if seen:
            phrase = " and ".join(with_article(words.get(name, name)) for name in seen)
            captions[path.name] = template.replace("{}", phrase)
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    with atomic_path(folder / METADATA) as temporary:
        lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items()]
        temporary.write_text("".join(lines), encoding="utf-8")
    return captions


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="folder of a network's model.safetensors and config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder that comes to hold links and captions")
    parser.add_argument("--target-images", default="mini", help="as the parameter target_images of step 2")
    parser.add_argument("--template", default="a street scene with {}")
    parser.add_argument(
        "--words", nargs="*", default=[], metavar="CLASS=WORD", help="where the class's name will not do"
    )
    parser.add_argument("--share", type=float, default=0.004, help="of the pixels that a class must have to be named")
    parser.add_argument("--most", type=int, default=2, help="classes in a caption")
    parser.add_argument("--side", type=int, default=0, help="shorter side at which the network sees them; 0: their own")
    chosen = parser.parse_args(arguments)
    words = dict(nfc(each).partition("=")[::2] for each in chosen.words)
    pictures = find_pictures(locate("target_images", chosen.target_images))
    captions = write_captions(
        chosen.network, pictures, chosen.out, chosen.template, words, chosen.share, chosen.most, chosen.side
    )
    print(f"{len(captions)} of {len(pictures)} images have a caption of their own in {chosen.out / METADATA}")


if __name__ == "__main__":
    main()
