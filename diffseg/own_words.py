"""A class list of one's own in the place of a benchmark: no labelled data, no official files."""

from collections.abc import Sequence
from dataclasses import replace

from diffseg.benchmarks import VOC, Benchmark, get_benchmark, voc_palette
from diffseg.errors import DiffsegError
from diffseg.words import class_names


def get_world(benchmark: str, class_list: Sequence[str] = ()) -> Benchmark:
    """Return the benchmark of that name or, with a class list, one that is made of it: background and its words.

    It is coded as VOC is (palette PNG, 255 = ignored), beyond 254 classes as ImageNet-S (R + 256 * G, 1000 =
    ignored), and has no splits: there is nothing to evaluate on. Raises DiffsegError for a bad list, one of
    more than 999 classes, and an unknown benchmark.
    """
    if not class_list:
        return get_benchmark(benchmark)
    names = class_names(class_list)
    if len(names) > 999:
        raise DiffsegError(f"The class list has {len(names)} classes: give at most 999, as id 1000 means ignored.")
    classes = ("background", *names)
    in_palette = len(classes) <= 255
    return replace(
        VOC,
        name="own-words",
        coding="palette" if in_palette else "r256g",
        classes=classes,
        ignore=255 if in_palette else 1000,
        splits=(),
        palette=voc_palette(len(classes)),
        source="a class list of one's own",
        folder="",
    )
