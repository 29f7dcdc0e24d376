"""The numbers of a run, from its manifests alone, and the published ones that stand beside them."""

from collections.abc import Mapping

import pandas as pd

from diffseg.files import read_rows
from diffseg.lab.manifests import machine_name
from diffseg.paths import project_root


def summarise(manifests: Mapping[str, Mapping]) -> dict:
    """Return the run's summary from the manifests of steps 1 to 5 (step name -> manifest).

    Keys: miou and miou_real (0..1; the latter None without a real network), ratio, their 95 % intervals, images,
    seconds per step, seed, benchmark, segmenter, hardware. Where the benchmark merges classes, groups holds each
    network's IoU of them (0..1).
    """
    scores = manifests["05_evaluation"]["metrics"]
    synthetic, real = scores["synthetic"], scores.get("real")
    machine = manifests["03_synthesis"]["hardware"]
    groups = {name: groups_of(scores[name]) for name in ("synthetic", "real") if name in scores}
    return {
        "benchmark": synthetic["benchmark"],
        "inference": synthetic["inference"],
        "miou": synthetic["miou"],
        "miou_interval": [synthetic["miou_low"], synthetic["miou_high"]],
        "miou_real": real["miou"] if real else None,
        "miou_real_interval": [real["miou_low"], real["miou_high"]] if real else None,
        "ratio": synthetic["miou"] / real["miou"] if real else None,
        **({"groups": groups} if groups["synthetic"] else {}),
        "images": manifests["03_synthesis"]["metrics"]["images"],
        "images_real": manifests["04_robust_training"]["metrics"]["images_real"],
        "validation_images": synthetic["images"],
        "segmenter": manifests["04_robust_training"]["parameters"]["segmenter"],
        "generator": manifests["03_synthesis"]["parameters"]["generator"],
        "seed": manifests["04_robust_training"]["parameters"]["seed"],
        "seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "hardware": machine_name(machine),
    }


def groups_of(scores: Mapping) -> dict[str, float | None]:
    """Return the IoU (0..1) of each group of merged classes in a network's metrics, None where it is not defined."""
    return {name.removeprefix("group/"): value for name, value in scores.items() if name.startswith("group/")}


def network_rows(summary: Mapping) -> list[dict]:
    """Return a dictionary for each trained network: name, images, miou, interval and groups (shares of 0..1)."""
    groups = summary.get("groups", {})
    names = {"synthetic": "synthetic pictures, masks from attention"}
    if summary["miou_real"] is not None:
        names["real"] = "real pictures, true masks"
    return [
        {
            "name": title,
            "images": summary["images" + suffix],
            "miou": summary["miou" + suffix],
            "interval": summary[f"miou{suffix}_interval"],
            "groups": groups.get(network, {}),
        }
        for (network, title), suffix in zip(names.items(), ("", "_real"), strict=False)
    ]


def percent(value: float | None) -> str:
    """Return a share of 0..1 in %, "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def table_text(summary: Mapping) -> str:
    """Return the run's table as plain text, one row a network; merged classes have a column each."""
    rows = network_rows(summary)
    groups = list(rows[0]["groups"])
    lines = [
        f"{summary['benchmark']}, {summary['validation_images']} validation pictures, {summary['segmenter']}, "
        f"seed {summary['seed']}, {summary['inference']}",
        f"{'trained on':<42}{'images':>8}{'mIoU (%)':>10}   95 % interval over pictures"
        + "".join(f"{group + ' (%)':>14}" for group in groups),
    ]
    for row in rows:
        bounds = " to ".join(map(percent, row["interval"]))
        merged = "".join(f"{percent(row['groups'].get(group)):>14}" for group in groups)
        lines.append(f"{row['name']:<42}{row['images']:>8}{percent(row['miou']):>10}   {bounds:<27}{merged}".rstrip())
    if summary["ratio"] is not None:
        lines.append(f"{'ratio':<50}{summary['ratio']:>10.2f}")
    return "\n".join(lines) + "\n"


def caption(summary: Mapping) -> str:
    """Return what every figure of the run must say: pictures, seed, hardware."""
    trained = f"{summary['images']} synthetic"
    if summary["miou_real"] is not None:
        trained += f" or {summary['images_real']} real"
    return (
        f"{summary['segmenter']} trained on {trained} pictures, seed {summary['seed']}; "
        f"{summary['validation_images']} {summary['benchmark']} validation pictures; {summary['hardware']}."
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
