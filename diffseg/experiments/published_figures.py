"""Draw again what stands in results/figures and follows from tables and records: no training, no generator.

python -m diffseg.experiments.published_figures

Figures of predictions and sheets of images need the runs; `diffseg study NAME`, `diffseg publish RUN` and the commands
in results/README.md draw them. `techniques_gains` (a table, too) sums up what each technique adds; `pipeline` shows the
method's steps. notebooks/figures holds it once a notebook, with that notebook's step marked, and the charts of their
texts.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from diffseg.charts import gains, mean_interval, study_scores
from diffseg.experiments.label_efficiency import label_figure
from diffseg.experiments.label_or_network import reliability_figure
from diffseg.experiments.ladder import UNTUNED, WITHOUT, ladder_figure
from diffseg.experiments.mask_ablation import Variant, betas_figure, steps_figure
from diffseg.experiments.noise import noise_figure
from diffseg.experiments.robust import WITHOUT_NETWORK, arms_figure
from diffseg.figures import COLOURS, WIDTH, save_figure
from diffseg.files import atomic_path, read_rows, write_text
from diffseg.lab.manifests import read_json
from diffseg.lab.report import OURS, ROBUST
from diffseg.lab.study_results import captions, score_rows
from diffseg.paths import project_root

SHOWN = ("reliability", "robust_arms")  # in notebook 04's text
# notebook -> where its box stands, and its text
BOXES = {
    "01": ((1.1, 1), "01 prompts"),
    "02": ((1.1, 0), "02 LoRA"),
    "00": ((1.1, 2), "00 mini world"),
    "03": ((2.35, 1), "03 images, masks"),
    "07": ((2.35, 0), "07 mask ablation"),
    "04": ((3.6, 1), "04 network"),
    "05": ((4.75, 1), "05 scores"),
    "06": ((5.9, 1), "06 report"),
}
INPUTS = {"words": (0, 1), "target\nimages": (0, 0)}
ARROWS = [("words", "01"), ("target\nimages", "02"), ("01", "03"), ("02", "03"), ("00", "03"), ("07", "03")]
ARROWS += [("03", "04"), ("04", "05"), ("00", "05"), ("05", "06")]
LABELS = {("00", "03"): "generator", ("00", "05"): "benchmark", ("07", "03"): "constants"}


def pipeline_figure(here: str = "") -> Figure:
    """Draw the notebooks as boxes and what they hand on as arrows; the box of notebook `here` is filled."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.7))
    half = {name: (0.3, 0.2) for name in INPUTS}
    half |= {name: (0.57 if len(text) > 13 else 0.45, 0.22) for name, (_, text) in BOXES.items()}
    places = INPUTS | {name: place for name, (place, _) in BOXES.items()}
    for name, (x, y) in places.items():
        width, height = half[name]
        if name in BOXES:
            look = {"facecolor": COLOURS[0] if name == here else "white", "edgecolor": COLOURS[0]}
            axis.add_patch(
                FancyBboxPatch((x - width, y - height), 2 * width, 2 * height, "round,pad=0,rounding_size=0.08", **look)
            )
        text = BOXES[name][1] if name in BOXES else name
        colour = "white" if name == here else "black"
        axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=7.5)
    for start, end in ARROWS:
        (x0, y0), (x1, y1) = places[start], places[end]
        below = y1 + half[end][1] * (-1 if y1 > y0 else 1)  # where an arrow from another row ends
        far = x1 - x0 > 2 and y0 != y1  # past other boxes: along the upper row, then down
        tail, head = (x0 + half[start][0], y0), (x1 if far else x1 - half[end][0] * 0.6, below)
        if y0 == y1:
            head = x1 - half[end][0], y1
        elif x0 == x1:
            tail, head = (x0, y0 + half[start][1]), (x1, below)
        look = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.4", "shrinkA": 0, "shrinkB": 0}
        look |= {"connectionstyle": "angle,angleA=0,angleB=90"} if far else {}
        axis.add_patch(FancyArrowPatch(tail, head, **look))
        if label := LABELS.get((start, end)):
            x, y = (tail[0] + head[0]) / 2 + 0.1, y0 + 0.05 if far else (tail[1] + head[1]) / 2
            axis.text(x, y, label, va="bottom" if far else "center", fontsize=7, color="0.3")
    axis.set(xlim=(-0.35, 6.45), ylim=(-0.3, 2.3))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def technique_gains(ladder: list[dict], arms: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Return heading -> technique -> differences in mIoU to training without it, paired by seed, on validation.

    ladder: rows of ladder_seeds.csv; arms: robust_arms_seeds.csv. What was not measured is left out.
    """
    rungs = pd.DataFrame(ladder).astype({"seed": int, "miou": float})
    rungs = rungs[rungs.split == "validation"].pivot(index="seed", columns=["benchmark", "rung"], values="miou")
    networks = arms[arms.split == "val"].pivot(index="seed", columns=["run", "arm"], values="miou")
    scores = pd.concat([rungs, networks], axis=1)  # a column a (benchmark, rung) and a (run, arm)
    voc, many, streets = "mini-voc", "mini-imagenet-s", "mini-cityscapes"
    of_voc, of_streets = f"{voc}-unrefined", f"{streets}-unrefined"
    one, restricted, alone = "ensemble, first network", "restricted", "edge-aware, one network"
    compared = {
        "mini VOC": {
            "augmented prompts": ((voc, OURS), (voc, WITHOUT)),
            "two averaged baselines": ((voc, "ensemble"), (voc, one)),
            "edge-aware co-training": ((voc, "edge-aware"), (voc, one)),
            WITHOUT_NETWORK: ((voc, WITHOUT_NETWORK), (voc, one)),
            "edge-aware, one network": ((voc, ROBUST), (voc, OURS)),
        },
        "mini VOC, masks without a refiner": {
            "two averaged baselines": ((of_voc, "ensemble"), (of_voc, one)),
            "restricted co-training": ((of_voc, restricted), (of_voc, one)),
            "edge-aware co-training": ((of_voc, "edge-aware"), (of_voc, one)),
            WITHOUT_NETWORK: ((of_voc, WITHOUT_NETWORK), (of_voc, one)),
            "edge-aware, one network": ((of_voc, alone), (of_voc, one)),
        },
        "mini ImageNet-S": {"edge-aware, one network": ((many, ROBUST), (many, OURS))},
        "mini Cityscapes": {
            "LoRA": ((streets, OURS), (streets, UNTUNED)),
            "augmented prompts and LoRA": ((streets, OURS), (streets, WITHOUT)),
            "edge-aware, one network": ((streets, ROBUST), (streets, OURS)),
            "all three, over none of them": ((streets, ROBUST), (streets, WITHOUT)),
        },
        "mini Cityscapes, masks without a refiner": {
            "two averaged baselines": ((of_streets, "ensemble"), (of_streets, one)),
            "edge-aware co-training": ((of_streets, "edge-aware"), (of_streets, one)),
            "edge-aware, one network": ((of_streets, alone), (of_streets, one)),
        },
    }
    found = {}
    for heading, techniques in compared.items():
        for name, (of, without) in techniques.items():
            if {of, without} <= {*scores} and (gained := (scores[of] - scores[without]).dropna().tolist()):
                found.setdefault(heading, {})[name] = gained
    return found


def gains_table(studies: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Return a row for each technique of `technique_gains`: seeds, mean gain in mIoU, and its 95 % interval."""
    rows = []
    for where, techniques in studies.items():
        for technique, gained in techniques.items():
            row = {"where": where, "technique": technique, "seeds": len(gained)}
            rows.append(row | dict(zip(("gain", "gain_low", "gain_high"), mean_interval(gained), strict=True)))
    return pd.DataFrame(rows).round(2)


def ablation_figures(tables: Path) -> dict[str, Figure]:
    """Return the charts of notebook 07 from its published table and manifest."""
    table = pd.read_csv(tables / "mask_ablation.csv", dtype={"resolutions": str, "steps": str}, keep_default_na=False)
    manifest = read_json(tables / "mask_ablation.manifest.json")
    used = manifest["parameters"]
    resolutions, layers = tuple(used["attention_resolutions"]), tuple(used["attention_layers"])
    base = Variant(resolutions, used["attention_steps"], used["refiner"], layers)
    return {
        "mask_ablation_betas": betas_figure(table, base),
        "mask_ablation_single_steps": steps_figure(table, base, used["sampling_steps"]),
    }


def main() -> None:
    results, notebooks = project_root() / "results", project_root() / "notebooks"
    tables = results / "tables"
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((results / "studies").glob("*.json"))}
    ladder, arms = read_rows(tables / "ladder_seeds.csv"), pd.read_csv(tables / "robust_arms_seeds.csv")
    gained = technique_gains(ladder, arms)
    write_text(tables / "techniques_gains.csv", gains_table(gained).to_csv(index=False))
    figures = {
        **{name: study_scores(score_rows(record), record["configurations"]) for name, record in records.items()},
        **ablation_figures(tables),
        "noise": noise_figure(pd.read_csv(tables / "noise_seeds.csv")),
        "ladder": ladder_figure(ladder),
        "robust_arms": arms_figure(arms),
        "label_efficiency": label_figure(pd.read_csv(tables / "label_efficiency_seeds.csv")),
        "reliability": reliability_figure(read_rows(tables / "reliability.csv")),
        "techniques_gains": gains(gained),
        "pipeline": pipeline_figure(),
    }
    for name, figure in figures.items():
        save_figure(figure, results / "figures" / f"{name}.png")
    for record in records.values():
        for name, text in captions(record).items():
            if (results / "figures" / f"{name}.png").is_file():  # predictions need the runs
                write_text(results / "figures" / f"{name}.txt", text)
    (notebooks / "figures").mkdir(exist_ok=True)
    shown = {f"pipeline_{name}": pipeline_figure(name) for name in BOXES}
    for name, figure in (shown | {name: figures[name] for name in SHOWN}).items():
        with atomic_path(notebooks / "figures" / f"{name}.svg") as temporary:
            with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffseg"}):
                figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    print("\n".join(str(results / "figures" / f"{name}.png") for name in figures))


if __name__ == "__main__":
    main()
