"""The numbers of a run, from its manifests alone, and the published ones that stand beside them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import stdev, variance

import pandas as pd
from scipy.special import stdtrit

from diffseg.files import read_rows
from diffseg.lab.declarations import INERT
from diffseg.lab.manifests import read_manifest
from diffseg.lab.provenance import machine_name
from diffseg.paths import project_root

# rungs of `diffseg.experiments.ladder` that train on a run's own images and masks: baselines, and as the run does
REAL = "real images, ground-truth masks"
OURS, ROBUST = "synthetic images, attention masks", "synthetic images, attention masks, robust training"


def summarise(manifests: Mapping[str, Mapping]) -> dict:
    """Return the run's summary from the manifests of notebooks 1 to 5 (step name -> manifest).

    Keys: miou and miou_real (0..1; the latter None without a real network), ratio, their 95 % intervals, images (those
    with a mask), images_mixed (real ones that the synthetic network was trained on beside them, if any), seconds per
    step, seed, benchmark, split, segmenter, hardware. Where the benchmark merges classes, groups holds each
    network's IoU of them (0..1).
    """
    scores = manifests["05_evaluation"]["metrics"]
    synthetic, real = scores["synthetic"], scores.get("real")
    groups = {
        network: {
            name.removeprefix("group/"): iou for name, iou in scores[network].items() if name.startswith("group/")
        }
        for network in ("synthetic", "real")
        if network in scores
    }
    training, made = manifests["04_robust_training"], manifests["03_synthesis"]["metrics"]
    images = made["images"] - made.get("failed", 0)
    mixed = training["metrics"]["images"] - images if training["parameters"].get("mix_real") else 0
    return {
        "benchmark": synthetic["benchmark"],
        "inference": synthetic["inference"],
        "miou": synthetic["miou"],
        "miou_interval": [synthetic["miou_low"], synthetic["miou_high"]],
        "miou_real": real["miou"] if real else None,
        "miou_real_interval": [real["miou_low"], real["miou_high"]] if real else None,
        "ratio": synthetic["miou"] / real["miou"] if real else None,
        **({"groups": groups} if groups["synthetic"] else {}),
        "images": images,
        **({"images_mixed": mixed} if mixed else {}),
        "images_real": training["metrics"]["images_real"],
        "validation_images": synthetic["images"],
        "split": manifests["05_evaluation"]["parameters"].get("evaluation_split") or "validation",
        "segmenter": training["parameters"]["segmenter"],
        "generator": manifests["03_synthesis"]["parameters"]["generator"],
        "seed": training["parameters"]["seed"],
        "seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "hardware": machine_name(manifests["03_synthesis"]["hardware"]),
    }


def reproduction(run: Path, summary: Mapping) -> dict | None:
    """Compare the run in a folder, whose summary is given, with the published one of its name, results/<name>.

    Returns published and measured (mIoU, 0..1), spread (standard deviation over seeds of the same training on the
    published images), tolerance and reproduced; None where no such run is published, where it had other parameters
    (seed aside), or where fewer than two seeds are. The tolerance is our choice: two trainings of different seeds
    differ by more in one case of twenty, by the spread over the known seeds and Student's t. Another CPU rounds
    differently, and training amplifies that as it amplifies another seed.
    """
    published, results = project_root() / "results" / run.name, project_root() / "results"
    trainings = results / "tables" / "ladder_seeds.csv"
    if not (published / "summary.json").is_file() or not trainings.is_file():
        return None
    for path in (published / "manifests").glob("0[1-5]_*.json"):
        both = json.loads(path.read_text(encoding="utf-8")), read_manifest(run / path.stem) or {}
        ours, theirs = (
            {k: v for k, v in each.get("parameters", {}).items() if k not in INERT | {"seed"}} for each in both
        )
        if ours != theirs:
            return None
    known = json.loads((published / "summary.json").read_text(encoding="utf-8"))
    scores = [
        float(row["miou"]) / 100
        for row in read_rows(trainings)
        if row["benchmark"] == run.name and row["split"] == known["split"] and row["rung"] == ROBUST
    ]
    if len(scores) < 2:
        return None
    tolerance = float(stdtrit(len(scores) - 1, 0.975)) * (2 * variance(scores)) ** 0.5
    return {
        "published": known["miou"],
        "measured": summary["miou"],
        "spread": stdev(scores),
        "tolerance": tolerance,
        "reproduced": abs(summary["miou"] - known["miou"]) <= tolerance,
    }


def reproduction_text(found: Mapping) -> str:
    """Return what `reproduction` found as one sentence."""
    return (
        f"published: {percent(found['published'])} % mIoU; this run: {percent(found['measured'])} %; "
        f"{'reproduced' if found['reproduced'] else 'NOT reproduced'} within {percent(found['tolerance'])} "
        "(what two seeds of it differ by in 19 of 20 cases)."
    )


def percent(value: float | None) -> str:
    """Return a share of 0..1 in %, "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(rows: Iterable[Mapping], form: str = "pipe") -> str:
    """Return rows, a dictionary each, as a Markdown table; texts stay as they are, what a row lacks is empty."""
    return pd.DataFrame(rows, dtype=object).fillna("").to_markdown(index=False, tablefmt=form, disable_numparse=True)


def table_text(summary: Mapping) -> str:
    """Return the run's table as plain text, one row a network; merged classes have a column each."""
    rows = []
    for network, suffix in (("synthetic", ""), ("real", "_real")):
        if summary["miou" + suffix] is not None:
            mixed = f", and {summary['images_mixed']} {REAL}" if "images_mixed" in summary else ""
            title = {"synthetic": OURS + mixed, "real": REAL}
            interval = " to ".join(map(percent, summary[f"miou{suffix}_interval"]))
            row = {"trained on": title[network], "images": summary["images" + suffix]}
            row |= {"mIoU (%)": percent(summary["miou" + suffix]), "95 % interval (images)": interval}
            groups = summary.get("groups", {}).get(network, {})
            rows.append(row | {f"{name} (%)": percent(iou) for name, iou in groups.items()})
    if summary["ratio"] is not None:
        rows.append({"trained on": "ratio", "mIoU (%)": f"{summary['ratio']:.2f}"})
    title = (
        f"{summary['benchmark']}, {summary['validation_images']} {summary['split']} images, {summary['segmenter']}, "
        f"seed {summary['seed']}, {summary['inference']}"
    )
    return f"{title}\n{markdown(rows, 'simple')}\n"


def caption(summary: Mapping) -> str:
    """Return what every figure of the run must say: images, seed, hardware."""
    trained = f"{summary['images']} synthetic"
    if "images_mixed" in summary:
        trained += f" and {summary['images_mixed']} real"
    if summary["miou_real"] is not None:
        trained += f" or {summary['images_real']} real"
    return (
        f"{summary['segmenter']} trained on {trained} images, seed {summary['seed']}; "
        f"{summary['validation_images']} {summary['benchmark']} {summary['split']} images; {summary['hardware']}."
    )


def published_numbers(protocol: str) -> pd.DataFrame:
    """Return the rows of results/published.csv on a benchmark ("voc", "imagenet-s", "cityscapes"), in its columns.

    mIoUs are in %, nan where they are not known to us; `sure` is "read" (in the source) or "second-hand" (in
    somebody else's account of it).
    """
    table = pd.DataFrame(read_rows(project_root() / "results" / "published.csv"))
    numbers = ["training_images", "miou", "miou_real"]
    table = table.assign(**table[numbers].apply(pd.to_numeric)).astype({"training_images": "Int64"})
    return table[table.benchmark.str.lower() == protocol].drop(columns="benchmark")


def beside_published(summary: Mapping, published: pd.DataFrame) -> pd.DataFrame:
    """Return the run's own row, in the columns of `published_numbers`, above the published ones."""
    ours = {
        "method": f"this run ({summary['benchmark']}, generator {summary['generator']})",
        "segmenter": summary["segmenter"],
        "training_images": summary["images"],
        "miou": round(100 * summary["miou"], 1),
        "miou_real": None if summary["miou_real"] is None else round(100 * summary["miou_real"], 1),
        "source": "manifests of steps 1 to 5",
        "sure": "measured",
        "differs": "",
    }
    return pd.DataFrame([ours, *published.to_dict("records")]).astype({"training_images": "Int64"})
