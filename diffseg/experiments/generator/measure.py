"""How good is the mini generator? Numbers, by the oracle; a diagnostic, no part of the method.

python -m diffseg.experiments.generator.measure     draws prompts of one and two objects: results/mini_generator.json

Every measure is also taken of drawn scenes of the same pictures on the same places: what a perfect generator would get.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm

from diffseg.benchmarks.classes import VOC
from diffseg.experiments.generator.asked import Asked, pair_prompts, scene_of, single_prompts
from diffseg.experiments.generator.heldout import held_out, iou
from diffseg.experiments.generator.pretrain import trainings
from diffseg.figures import Tile, save_figure, story
from diffseg.files import write_text
from diffseg.generator import load_generator, locate_generator
from diffseg.lab.provenance import provenance
from diffseg.lab.report import markdown, percent
from diffseg.masks import label_and_margin
from diffseg.miniworld.oracle import (
    CLASS_IDS,
    WEIGHTS,
    class_probabilities,
    load_oracle,
    main_picture,
    picture_probabilities,
)
from diffseg.miniworld.scenes import PLACES
from diffseg.paths import project_root
from diffseg.refiners import REFINERS, get_refiner
from diffseg.synthesis import SynthesisOptions, draw_with_masks

# Our choices; the report's `real` shows what drawn scenes get by them.
LEAST_AREA = 0.02  # share of the picture from which an object of a pair counts as there
FRAME = 4  # pixels of border in which the background is looked for
MOST_DISTANCE = 40.0  # of the border's colours (RGB, 0..255, Euclidean, mean) from its place's
ALIKE = 0.15  # 1 - IoU below which two layouts count as one
BATCH = 20  # pictures drawn at once


# ---------------------------------------------------------------------------------------------- judging


def place_of(image: np.ndarray, is_free: np.ndarray) -> tuple[str, float]:
    """Return the place whose gradient is nearest to a picture's border, and the mean distance of colours to it.

    image: uint8 H x W x 3; is_free: bool H x W, True where no object is. Only free pixels within FRAME of the edge
    count; without any the place is "" and the distance infinite.
    """
    height, width = is_free.shape
    border = np.ones((height, width), bool)
    border[FRAME:-FRAME, FRAME:-FRAME] = False
    rows, columns = np.nonzero(border & is_free)
    if len(rows) == 0:
        return "", float("inf")
    share = (rows / (height - 1))[:, None]
    colours = image[rows, columns].astype(float)
    distances = {
        place: np.linalg.norm(colours - (1 - share) * np.array(top) - share * np.array(bottom), axis=1).mean()
        for place, (top, bottom) in PLACES.items()
    }
    nearest = min(distances, key=distances.get)
    return nearest, float(distances[nearest])


def mask_scores(label: torch.Tensor, classes: torch.Tensor, objects: torch.Tensor, ids: list[int]) -> dict[str, float]:
    """Compare a label map with the oracle's: mean IoU over the prompt's class ids, and IoU of any object at all."""
    return {
        "iou": float(np.mean([iou(label == i, classes == i) for i in ids])),
        "iou_object": iou(label > 0, objects),
    }


def judge(asked: Asked, image: np.ndarray, label: torch.Tensor, probabilities: torch.Tensor) -> dict:
    """Compare a picture (uint8 H x W x 3) and its mask (class ids, H x W) with what the oracle sees in it.

    probabilities: float (1 + pictures) x H x W. present: the first class is the largest that is seen; both: every
    class has LEAST_AREA of the picture; own_picture: the classifier names the word's own picture; background: the
    border has the place's colours.
    """
    objects = probabilities.argmax(dim=0) > 0
    classes = class_probabilities(probabilities[None])[0].argmax(dim=0)
    ids = [CLASS_IDS[name] for name in asked.prompt.classes]
    areas = torch.bincount(classes.flatten(), minlength=VOC.num_classes)
    areas[0] = 0
    place, distance = place_of(image, ~objects.numpy())
    return {
        "class": asked.prompt.classes[0],
        "word": asked.prompt.words[0],
        "relation": asked.prompt.relations[0],
        "present": bool(areas.max() > 0 and areas.argmax() == ids[0]),
        "both": all(areas[i].item() >= LEAST_AREA * classes.numel() for i in ids),
        "own_picture": main_picture(probabilities[None]).item() == asked.pictures[0],
        "background": place == asked.place and distance <= MOST_DISTANCE,
        "objects": objects,
        **mask_scores(label, classes, objects, ids),
    }


def nearest_distances(layouts: torch.Tensor) -> torch.Tensor:
    """Return each layout's 1 - IoU with the one most like it; layouts: bool N x H x W, N > 1; float N."""
    flat = layouts.flatten(1).float()
    shared = flat @ flat.T
    sizes = flat.sum(dim=1)
    distance = 1 - shared / (sizes[:, None] + sizes - shared).clamp(min=1)
    return distance.fill_diagonal_(torch.inf).amin(dim=1)


def nearest_colours(images: torch.Tensor) -> torch.Tensor:
    """Return each picture's root mean square difference from its nearest; float N x 3 x H x W in 0..1; float N."""
    flat = images.flatten(1)
    return (torch.cdist(flat, flat) / flat.shape[1] ** 0.5).fill_diagonal_(torch.inf).amin(dim=1)


def diversity(rows: list[dict], images: list[np.ndarray]) -> dict[str, float]:
    """Return nearest-neighbour distances among the pictures of one class, averaged over all classes' pictures.

    layout: 1 - IoU of the objects that the oracle sees; colours: RMS difference, 0..1; distinct_layouts: the share
    of pictures whose layout is farther than ALIKE from every other one. nan where no class has two pictures.
    """
    layouts, colours = [], []
    for name in sorted({row["class"] for row in rows}):
        members = [k for k, row in enumerate(rows) if row["class"] == name]
        if len(members) > 1:
            layouts.append(nearest_distances(torch.stack([rows[k]["objects"] for k in members])))
            colours.append(nearest_colours(torch.from_numpy(np.stack([images[k] for k in members])).float() / 255))
    if not layouts:
        return dict.fromkeys(("layout", "colours", "distinct_layouts"), float("nan"))
    layouts, colours = torch.cat(layouts), torch.cat(colours)
    return {
        "layout": layouts.mean().item(),
        "colours": colours.mean().item(),
        "distinct_layouts": (layouts > ALIKE).float().mean().item(),
    }


# ---------------------------------------------------------------------------------------------- measuring


@dataclass
class Judged:
    """What was drawn for a list of prompts, and what the oracle says of it; one entry a picture."""

    rows: list[dict]
    images: list[np.ndarray]
    labels: list[torch.Tensor]
    refined: dict[str, list[dict]]  # refiner -> mask scores
    seconds: float  # of drawing with attention, without judging


def draw_and_judge(
    pipeline, oracle, asked: list[Asked], synthesis: SynthesisOptions, refiners: tuple[str, ...]
) -> Judged:
    """Draw each prompt once; judge the picture, its mask before any refiner, and its mask after each refiner."""
    result = Judged([], [], [], {name: [] for name in refiners}, 0.0)
    refine = {name: get_refiner(name, "mini", device=pipeline.device) for name in refiners}
    for start in tqdm(range(0, len(asked), BATCH), "drawing and judging", unit="batch"):
        part = asked[start : start + BATCH]
        since = time.perf_counter()
        drawn = draw_with_masks(pipeline, [one.prompt for one in part], VOC, synthesis)
        result.seconds += time.perf_counter() - since
        pixels = torch.stack([to_image(one.image) for one in drawn])
        for one, picture, image, p in zip(part, drawn, pixels, picture_probabilities(oracle, pixels), strict=True):
            result.images.append(np.asarray(picture.image))
            result.labels.append(picture.label)
            result.rows.append(judge(one, result.images[-1], picture.label, p))
            classes, objects = class_probabilities(p[None])[0].argmax(dim=0), result.rows[-1]["objects"]
            for name, refiner in refine.items():
                scores = refiner(to_dtype(image, torch.float32, scale=True), picture.scores, synthesis.beta)
                label, _ = label_and_margin(picture.ids, scores)
                result.refined[name].append(mask_scores(label, classes, objects, picture.ids))
    return result


def judge_real(oracle, asked: list[Asked], seed: int) -> Judged:
    """Judge drawn scenes of the same pictures and places, with their true masks: what a perfect generator would get."""
    result = Judged([], [], [], {}, 0.0)
    for one in asked:
        scene = scene_of(one, seed)
        result.images.append(scene.image)
        result.labels.append(torch.from_numpy(scene.label(CLASS_IDS)))
        p = picture_probabilities(oracle, torch.from_numpy(scene.image).permute(2, 0, 1)[None])[0]
        result.rows.append(judge(one, scene.image, result.labels[-1], p))
    return result


def mean_of(rows: list[dict], key: str) -> float:
    return float(np.mean([row[key] for row in rows])) if rows else float("nan")


MEASURES = {
    "class_present": "present",
    "mask_iou": "iou",
    "mask_iou_object": "iou_object",
    "own_picture": "own_picture",
    "background": "background",
}


def summarise(single: Judged, pairs: Judged) -> dict:
    """Return the report's numbers over all words, plain class words and hyponyms, and over pairs; shares in 0..1."""
    plain = [row for row in single.rows if row["relation"] == "plain"]
    hyponyms = [row for row in single.rows if row["relation"] == "hyponym"]
    numbers = {name: mean_of(single.rows, key) for name, key in MEASURES.items()}
    numbers |= {f"{name}_plain_words": mean_of(plain, key) for name, key in MEASURES.items()}
    numbers |= {f"{name}_hyponyms": mean_of(hyponyms, key) for name, key in MEASURES.items()}
    numbers |= {"both_present": mean_of(pairs.rows, "both"), "mask_iou_pairs": mean_of(pairs.rows, "iou")}
    numbers["diversity"] = diversity(single.rows, single.images)
    return {name: None if value != value else value for name, value in numbers.items()}  # nan becomes JSON's null


def per_class(rows: list[dict]) -> dict[str, dict[str, float]]:
    names = sorted({row["class"] for row in rows}, key=CLASS_IDS.get)
    members = {name: [row for row in rows if row["class"] == name] for name in names}
    return {name: {key: mean_of(some, key) for key in MEASURES.values()} for name, some in members.items()}


def save_sheets(judged: Judged, folder: Path) -> None:
    """Save sheets of the 24 worst, best and first images by mask IoU, each with its word, its mask and the IoU."""
    order = np.argsort([row["iou"] for row in judged.rows])
    for name, chosen in (("worst", order[:24]), ("best", order[::-1][:24]), ("usual", np.arange(24))):
        chosen = chosen[chosen < len(judged.rows)]
        parts = []
        for part in range(0, len(chosen), 8):
            some = chosen[part : part + 8]
            masks = [Tile(judged.images[k], judged.labels[k], f"{100 * judged.rows[k]['iou']:.0f} %") for k in some]
            rows = {"image": [judged.images[k] for k in some], "mask, IoU": masks}
            parts.append(("", [judged.rows[k]["word"] for k in some], rows))
        save_figure(story(parts, VOC.classes), folder / f"mini_generator_{name}.png")


def quality_tables(report: Mapping) -> str:
    """Return the report of `measure_generator` as two Markdown tables: the images, and the masks by refiner."""
    rows = []
    for name, key in (
        ("the prompted class is the largest object (%)", "class_present"),
        ("the image is the word's own, not another of its class (%)", "own_picture"),
        ("the background is the prompted one (%)", "background"),
        ("IoU of the unrefined attention mask with the oracle's mask of that class (%)", "mask_iou"),
        ("IoU of the unrefined attention mask with the oracle's mask of any class (%)", "mask_iou_object"),
        ("of two prompted objects both are there (%)", "both_present"),
    ):
        row = {"measure": name, "all words": percent(report[key])}
        row["class words"] = percent(report.get(f"{key}_plain_words"))
        rows.append(row | {"scenes": percent(report["real"][key])})
    masks = []
    for refiner, found in {"none": report, **report["refined"]}.items():
        key = f"mask_iou_{refiner}".removesuffix("_none")
        scores = [found["mask_iou"], found["mask_iou_pairs"], report["scenes"][key], report["scenes_pairs"][key]]
        titles = ("generated, one object", "generated, two", "noised scenes, one", "noised scenes, two")
        masks.append(
            {"mean IoU of masks (%)": f"refiner `{refiner}`"} | dict(zip(titles, map(percent, scores), strict=True))
        )
    parts, threads = trainings(report["training"]), report["hardware"]["threads"] or report["hardware"]["cores"]
    note = (
        f"{report['pictures']} images of one object and {report['pairs']} of two, {report['pictures_per_second']} a "
        f"second (threads: {threads}). The oracle's mIoU on mini VOC: {percent(report['oracle']['miou'])} %. Training: "
        f"{sum(part['samples_seen'] for part in parts):,} samples, {sum(part['seconds'] for part in parts) / 3600:.1f} "
        f"hours (CPU cores: {report['training']['hardware']['cores']})."
    )
    return "\n\n".join([markdown(rows), markdown(masks), note]) + "\n"


def measure_generator(options: argparse.Namespace) -> dict:
    """Write <results>/mini_generator.json, its tables and the sheets of best and worst pictures; return the report.

    class_present: share of single-object pictures in which the prompted class is the largest object that the oracle
    sees. mask_iou: mean IoU of the attention mask (before any refiner) with the oracle's mask of that class, 0 where it
    sees none of it; mask_iou_object: the same with the oracle's mask of all objects, whatever class it takes them for.
    own_picture, background, both_present: see `judge`. real: the same numbers of drawn scenes with their true masks.
    refined: the masks after each refiner. scenes, scenes_pairs: the generator's loss on those scenes, and the IoU of
    its attention's masks with the true ones, before and after the refiners; no oracle has a part in it (`held_out`).
    """
    oracle = load_oracle(options.oracle).to(options.device)
    pipeline = load_generator(options.generator, options.device)
    synthesis = SynthesisOptions(
        64, 64, options.sampling_steps, options.guidance, (16,), options.attention_steps, options.beta, "none"
    )
    singles, twos = single_prompts(options.pictures, options.seed), pair_prompts(options.pairs, options.seed)
    refiners = tuple(options.refiners)
    single = draw_and_judge(pipeline, oracle, singles, synthesis, refiners)
    pairs = draw_and_judge(pipeline, oracle, twos, synthesis, refiners)
    real = summarise(judge_real(oracle, singles, options.seed), judge_real(oracle, twos, options.seed))
    note = json.loads((options.oracle / "training.json").read_text())
    seconds = single.seconds + pairs.seconds
    sampling = ("sampling_steps", "guidance", "attention_steps", "beta", "seed")
    report = {
        **summarise(single, pairs),
        "refined": {
            name: {f"mask_{key}": mean_of(rows, key) for key in ("iou", "iou_object")}
            | {f"mask_{key}_pairs": mean_of(pairs.refined[name], key) for key in ("iou", "iou_object")}
            for name, rows in single.refined.items()
        },
        "scenes": held_out(pipeline, singles, options.beta, options.seed, ("none", *refiners)),
        "scenes_pairs": held_out(pipeline, twos, options.beta, options.seed, ("none", *refiners)),
        "real": real,
        "pictures": len(singles),
        "pairs": len(twos),
        "pictures_per_second": round((len(singles) + len(twos)) / seconds, 2) if seconds else None,
        "sampling": {name: getattr(options, name) for name in sampling},
        "thresholds": {"least_area": LEAST_AREA, "frame": FRAME, "most_distance": MOST_DISTANCE, "alike": ALIKE},
        "oracle": {name: note[name] for name in ("miou", "samples", "parameters", "held_out")},
        "per_class": per_class(single.rows),
        "training": json.loads((Path(locate_generator(options.generator)) / "training.json").read_text()),
        **provenance(),
    }
    write_text(options.results / "mini_generator.json", json.dumps(report, indent=1) + "\n")
    write_text(options.results / "tables" / "mini_generator.md", quality_tables(report))
    save_sheets(single, options.results / "figures")
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, default=WEIGHTS / "oracle", help="the oracle's folder")
    parser.add_argument("--generator", default="mini", help="a name or a folder with training.json")
    parser.add_argument("--results", type=Path, default=project_root() / "results", help="where to write")
    parser.add_argument("--pictures", type=int, default=1050, help="pictures of one object: ten for every word")
    parser.add_argument("--pairs", type=int, default=200, help="pictures of two objects")
    parser.add_argument("--refiners", nargs="*", choices=REFINERS, default=["pamr", "sam"], help="to be compared")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--attention-steps", default="4-7", help="denoising steps whose attention is averaged")
    parser.add_argument("--beta", type=float, default=0.4, help="of the mask, as in the notebooks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    report = measure_generator(options)
    print(json.dumps({key: report[key] for key in list(report)[: list(report).index("sampling")]}, indent=1))


if __name__ == "__main__":
    main()
