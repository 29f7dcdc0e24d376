"""Trainings that are compared seed by seed: each is made once, and their mean difference has an interval."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.evaluation import evaluate
from diffseg.charts import mean_interval
from diffseg.errors import DiffsegError
from diffseg.files import sha256_text, write_text
from diffseg.lab.batch import step_parameters
from diffseg.lab.manifests import read_json, read_manifest
from diffseg.lab.steps import code_of, named_files, notebook_of
from diffseg.paths import project_root
from diffseg.segmenters import Ensemble, Segmenter, load_segmenter, new_networks
from diffseg.training import train_once
from diffseg.training_options import NETWORKS, TrainingOptions

TRAINING = "from diffseg import training"


def parser_of(description: str, folder: str, seeds: int = 5) -> argparse.ArgumentParser:
    """Return the options that the comparisons share. folder: below results/runs, where the networks are kept."""
    results = project_root() / "results"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="", help="scored split; the benchmark's evaluation split if empty, or dev")
    parser.add_argument("--seeds", type=int, default=seeds, help="0, 1, ...: more seeds may follow in a later call")
    parser.add_argument("--folder", type=Path, default=results / "runs" / folder, help="where the networks are kept")
    parser.add_argument("--out", type=Path, default=results, help="where tables and figures go")
    return parser


def write_tables(tables: Path, name: str, means: pd.DataFrame, rows: pd.DataFrame, about: Mapping) -> None:
    """Write NAME.csv, NAME_seeds.csv with a row a training, and NAME.json, which says what they were made with."""
    for title, table in ((name, means), (f"{name}_seeds", rows)):
        write_text(tables / f"{title}.csv", table.to_csv(index=False))
    write_text(tables / f"{name}.json", json.dumps(about, indent=1))


class Relabelled(Dataset):
    """Images of a synthetic set with other labels; items (name, image, label).

    relabel: from an item of the set (name, image, label, reliability) to the new label, int64 H x W.
    """

    def __init__(self, images: Dataset, relabel: Callable[..., torch.Tensor]):
        self.images = images
        with torch.inference_mode():
            self.labels = [relabel(*images[k]) for k in range(len(images))]
        self.key = hashlib.sha256(b"".join(each.numpy().tobytes() for each in self.labels)).hexdigest()[:20]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        return *self.images[index][:2], self.labels[index]


def images_key(run: Path) -> str:
    """Return what names a run's images and masks, a digest of their files: code that draws the same moves no key.

    An unfinished step 3 raises a DiffsegError.
    """
    steps = [read_manifest(run / step) if run.is_dir() else None for step in ("03_drawing", "03_synthesis")]
    if None in steps:
        raise DiffsegError(f"{run} has no finished step 3; run `diffseg run ... --only 1-3 --set run={run.name}`.")
    return " ".join(each["outputs"]["sha256"][:20] for each in steps)


def real_key(parameters: Mapping, root: Path, *what: object) -> str:
    """Return what names real images in a training's recipe, as `images_key` does a run's: root is their data's."""
    named = parameters["data_root"], root.name, parameters["training_split"], *what
    return " ".join(str(each) for each in named if each != "")


def named_fields(options: type, parameters: Mapping, prefix: str = "") -> dict:
    """Return the fields of a dataclass of options that a step's parameters give, lists as tuples; in the parameters
    their names begin with `prefix`."""
    known = [field.name for field in fields(options) if f"{prefix}{field.name}" in parameters]
    values = {name: parameters[f"{prefix}{name}"] for name in known}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def training_parameters(values: Mapping) -> dict:
    """Return step 4's parameters of a parameter file's `values`. Comparisons score at scale 1, unmirrored, without
    a CRF: a file that has its run scored otherwise raises a DiffsegError."""
    plain = {"evaluation_scales": [1.0], "evaluation_flip": False, "evaluation_crf": False}
    if said := [f"{name}={values[name]}" for name, usual in plain.items() if values.get(name, usual) != usual]:
        raise DiffsegError(
            f"the parameter file says {', '.join(said)}, but comparisons score at scale 1, unmirrored and unrefined; "
            "take a copy of it without."
        )
    return step_parameters(notebook_of("04_robust_training"), values)


def options_of(parameters: dict, mode: str) -> TrainingOptions:
    """Return the training of step 4 under its parameters, in another mode."""
    changed = {"precision": parameters["training_precision"], "training_mode": mode}
    return TrainingOptions(**named_fields(TrainingOptions, parameters) | changed)


def recipe_of(parameters: Mapping, code: str = TRAINING) -> dict:
    """Return what earlier rows of a table must have been made with: parameters, and a digest of the package's code
    that an import statement reaches."""
    return {**parameters, "code": sha256_text(json.dumps(code_of([code])))[:12]}


def network_folder(
    folder: Path, name: str, images: str | None, parameters: dict, options: TrainingOptions, seed: int
) -> Path:
    """Return the place of a training's network: one of another recipe or other code lies elsewhere."""
    start = {each: parameters[each] for each in ("segmenter", "encoder_weights")}
    named = named_files(start | {"initial_network": parameters.get("initial_network", "")})  # wherever it lies
    recipe = json.dumps([images, start, named, asdict(options), code_of([TRAINING])])
    return folder / sha256_text(recipe)[:12] / f"{name}-{seed}"


def trained(
    folder: Path,
    name: str,
    images: str | None,
    parameters: dict,
    options: TrainingOptions,
    dataset: Dataset,
    benchmark: Benchmark,
    seed: int,
) -> Segmenter | Ensemble:
    """Return a training's network on this machine's device; one that is in `folder` already is not trained again.

    name: of the training, any seed's. images: key of the synthetic or real ones. parameters: of step 4.
    """
    if isinstance(dataset, Relabelled):  # its labels follow from more than the run's files
        images = f"{images} {dataset.key}"
    device, place = PartialState().device, network_folder(folder, name, images, parameters, options, seed)
    start = parameters["encoder_weights"] or None, parameters.get("initial_network", "")
    count = NETWORKS[options.training_mode]
    untrained = partial(new_networks, count, parameters["segmenter"], benchmark.classes, seed, *start)
    train_once(place, untrained, dataset, benchmark.ignore, options, seed, device, f"{name}, seed {seed}")
    return load_segmenter(place).to(device)


def scores(network: nn.Module, scored: Dataset, benchmark: Benchmark) -> dict[str, float]:
    """Return a network's mIoU ("miou") and the IoU of the benchmark's merged classes on a split, in %."""
    device = next(network.parameters()).device
    found = evaluate(network, scored, benchmark, batch_size=32, device=device, bootstrap=2)
    return {name: 100 * value for name, value in {"miou": found.miou, **found.groups}.items()}


def score(network: nn.Module, scored: Dataset, benchmark: Benchmark) -> float:
    """Return a network's mIoU on a split in %, without a useful interval."""
    return scores(network, scored, benchmark)["miou"]


def paired_gain(scores: dict[int, float], others: dict[int, float]) -> tuple[float, float, float]:
    """Return the mean difference of equal seeds (seed -> score in %) and the ends of its 95 % interval of Student's t;
    nan for fewer than two seeds: a difference of two single trainings is no result."""
    gains = [scores[seed] - others[seed] for seed in sorted(scores.keys() & others.keys())]
    if len(gains) < 2:
        return (float("nan"),) * 3
    return mean_interval(gains)


def with_earlier(rows: pd.DataFrame, table: Path, training: Sequence[str], about: Mapping) -> pd.DataFrame:
    """Return a call's rows, after those of NAME_seeds.csv, `table`, whose trainings it has not made again.

    training: the columns that name a training. about: what earlier rows must have been made with to stay; the NAME.json
    beside the table says what they were.
    """
    recorded = read_json(table.with_name(table.name.replace("_seeds.csv", ".json"))) or {}
    if not table.is_file() or any(recorded.get(name) != value for name, value in about.items()):
        return rows
    return pd.concat([pd.read_csv(table), rows]).drop_duplicates(training, keep="last")
