"""Which layers should LoRA tune, and how far, so that the domain comes with class words and the masks stay good?

python -m diffseg.experiments.lora_variants mini-cityscapes [--variants self-attention ...] [--seeds 3]
    results/tables/lora_variants.csv (means), lora_variants_seeds.csv (a row a tuning), lora_variants.json,
    results/figures/lora_variants.png and .pdf (images of class words, a row a variant)

Each variant is tuned as in notebook 02 and draws the run's own prompts, the same seeds for all. The distance of these
images to held-out images of the domain says how much of the domain came; a judge, which is trained on ground-truth
masks, says whether the words' objects are there and how good their masks are. No benchmark's image is scored.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.ndimage import label
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.metrics import ConfusionMatrix, mean_iou
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.experiments.mask_ablation import SMALLEST_OBJECT, as_pixels, reference_label
from diffseg.experiments.oracle import free_scene, picture_label
from diffseg.experiments.paired import options_of, score, trained, with_earlier
from diffseg.figures import picture_rows, save_figure
from diffseg.files import atomic_path, sha256_text, write_text
from diffseg.generator import draw, load_generator
from diffseg.lab.batch import resolve, step_parameters
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import notebook_of
from diffseg.lora import TuningOptions, load_lora, tune
from diffseg.miniworld.oracle import classes_of_pictures
from diffseg.paths import locate, project_root
from diffseg.pictures import read_picture
from diffseg.prompts import Prompt, read_prompts
from diffseg.seeds import derive_seed
from diffseg.synthesis import SynthesisOptions, draw_with_masks
from diffseg.target_domain import find_pictures, fit, hold_out, kernel_distance, latent_features
from diffseg.words import with_article

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
SELF = [f"attn1.{name}" for name in PROJECTIONS]
FEED_FORWARD, CONVOLUTIONS = ["net.0.proj", "net.2"], ["conv1", "conv2"]
MEASURES = "distance", "distance_caption", "present", "objects", "mask_miou"
PRIOR = "prior"  # share of the tuned images that are the untuned generator's own, of class words; no parameter of 02
JUDGE = {"iterations": 1200, "scale_jitter": [1.6, 2.2], "colour_jitter": 0.2}  # longer and nearer to what it judges
# Variant -> what differs from the parameter file
VARIANTS: dict[str, dict] = {
    "no LoRA": {"lora_scale": 0.0},
    "no LoRA, square": {"lora_scale": 0.0, "width": 64, "lora_width": 64},  # the size it was trained at
    "self-attention": {"lora_targets": SELF},
    "both attentions": {"lora_targets": list(PROJECTIONS)},
    "self-attention, feed-forward": {"lora_targets": SELF + FEED_FORWARD},
    "self-attention, convolutions": {"lora_targets": SELF + CONVOLUTIONS},
    "convolutions": {"lora_targets": CONVOLUTIONS},
    "all but cross-attention": {"lora_targets": SELF + FEED_FORWARD + CONVOLUTIONS},
    "self-attention, rank 32": {"lora_targets": SELF, "lora_rank": 32, "lora_alpha": 32.0},
    "self-attention, twice the steps": {"lora_targets": SELF, "lora_steps": 480},
    "self-attention, scale 0.5": {"lora_targets": SELF, "lora_scale": 0.5},
    "self-attention, scale 1.5": {"lora_targets": SELF, "lora_scale": 1.5},
    "self-attention, a third own images": {"lora_targets": SELF, PRIOR: 1 / 3},
    "self-attention, convolutions, a third own images": {"lora_targets": SELF + CONVOLUTIONS, PRIOR: 1 / 3},
}


class LabelledScenes(Dataset):
    """Two free scenes of the mini world side by side, so wide as a street: (name, image uint8 3 x H x W, label)."""

    def __init__(self, benchmark: Benchmark, name: str, count: int):
        self.name, self.count, self.ids = name, count, classes_of_pictures(benchmark)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        scenes = [free_scene(0, self.name, 2 * index + k) for k in range(2)]
        image = torch.cat([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes], dim=2)
        classes = torch.cat([self.ids[torch.from_numpy(picture_label(scene))] for scene in scenes], dim=1)
        return f"{self.name}-{index}", image, classes


def judge_of(parameters: dict, benchmark: Benchmark, root: Path, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Return a network that knows the domain and the mini world's scenes, and its mIoU in % on others of both.

    The images that are judged lie between the two: the oracle alone fails on streets. It is no part of the method.
    """
    real = open_split(benchmark, root, benchmark.training_split)
    scenes = LabelledScenes(benchmark, "judge", len(real))
    options = options_of(parameters | JUDGE, "baseline")
    network = trained(folder, "judge", None, parameters, options, ConcatDataset([real, scenes]), benchmark, 0)
    others = {"domain": open_split(benchmark, root, "dev"), "scenes": LabelledScenes(benchmark, "judged", 400)}
    found = {name: round(score(network, some, benchmark), 1) for name, some in others.items()}
    return network.cpu().eval(), found


def own_images(pipeline, rows: Sequence[Prompt], count: int, values: dict, folder: Path) -> list[Path]:
    """Draw `count` images of the prompts' words without the domain's, each with its caption in a .txt beside it; return
    their paths. Tuned on among the domain's images they preserve the prior (Ruiz et al. 2023)."""
    paths = [folder / f"{k:04d}.png" for k in range(count)]
    for start in tqdm(range(0, count, 8), "drawing own images", unit="batch"):
        part = [k for k in range(start, min(start + 8, count)) if not paths[k].with_suffix(".txt").is_file()]
        texts = [f"a photo of {' and '.join(map(with_article, rows[k % len(rows)].words))}" for k in part]
        images = draw_texts(pipeline, texts, [derive_seed(0, "lora", "prior", k) for k in part], values)
        for k, text, image in zip(part, texts, images, strict=True):
            with atomic_path(paths[k]) as path:
                image.save(path)
            write_text(paths[k].with_suffix(".txt"), text)
    return paths


def draw_texts(pipeline, texts: Sequence[str], seeds: Sequence[int], values: dict) -> list[Image.Image]:
    """Draw texts of any number at the size and with the steps of notebook 02."""
    size = values["lora_height"], values["lora_width"], values["sampling_steps"], values["guidance_scale"]
    parts = [slice(start, start + 8) for start in range(0, len(texts), 8)]
    return [image for part in parts for image in draw(pipeline, texts[part], seeds[part], None, *size)]


def tuned_pipeline(name: str, values: dict, rows: Sequence[Prompt], seed: int, folder: Path):
    """Return a generator under a variant's LoRA, tuned on where it was stopped, and the features of held-out images.

    values: the parameters of notebook 02, and lora_scale. Variants that differ by their scale alone share a tuning.
    """
    pipeline = load_generator(values["generator"], scheduler=values["generator_scheduler"])
    pictures = find_pictures(locate("target_images", values["target_images"]))
    paths, held_out = hold_out(pictures, values["lora_held_out"], seed)
    size = values["lora_height"], values["lora_width"]
    targets = latent_features(pipeline, [fit(read_picture(path), *size) for path in held_out])
    if values["lora_scale"]:
        if share := VARIANTS[name].get(PRIOR, 0):
            paths += own_images(pipeline, rows, round(share / (1 - share) * len(paths)), values, folder / "own")
        given = {field.name: values[f"lora_{field.name}"] for field in fields(TuningOptions)}
        options = TuningOptions(**given | {"targets": tuple(values["lora_targets"])})
        place = folder / sha256_text(json.dumps([share, seed, asdict(options)]))[:12]
        tune(pipeline, paths, values["lora_captions"], options, place, seed)
        load_lora(pipeline, place, values["lora_scale"])
    return pipeline, targets


def judge_images(
    pipeline, rows: Sequence[Prompt], benchmark: Benchmark, options: SynthesisOptions, judge: nn.Module
) -> tuple[list[Image.Image], dict[str, float]]:
    """Draw rows with their masks; return the images, the share of their words' classes that the judge sees (in %), how
    many separate objects it sees of such a class, and the mIoU of the masks in %, the judge's as truth, over the images
    where it sees all of their classes."""
    images, seen, objects = [], [], []
    smallest = SMALLEST_OBJECT * options.height**2  # pixels: the same in a wide image as in a square one
    matrix = ConfusionMatrix(benchmark.num_classes, benchmark.ignore)
    for start in tqdm(range(0, len(rows), 8), "drawing class words", unit="batch"):
        part = rows[start : start + 8]
        for row, one in zip(part, draw_with_masks(pipeline, part, benchmark, options), strict=True):
            images.append(one.image)
            with torch.inference_mode():
                found = judge(as_pixels(one.image)[None])[0].argmax(dim=0)
            ids = sorted({benchmark.classes.index(name) for name in row.classes})
            parts = [np.bincount(label(found == k)[0].flat)[1:] for k in ids]  # pixels of each connected part
            seen += [sum(sizes) >= smallest for sizes in parts]
            objects += [n for sizes in parts if (n := sum(sizes >= smallest))]
            if (truth := reference_label(found, ids, benchmark.ignore)) is not None:
                matrix.update(truth, one.label)
    miou = float(mean_iou(matrix.class_sums, "voc"))
    return images, {"present": 100 * np.mean(seen), "objects": np.mean(objects), "mask_miou": 100 * miou}


def measure(chosen: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, list[Image.Image]], dict]:
    """Tune and judge each variant and seed; return a row each, images of the last seed, and what all rows share."""
    base, run = resolve(chosen.run, {})
    training = step_parameters(notebook_of("04_robust_training"), base)
    benchmark, root = get_benchmark(base["benchmark"]), data_folder(base["data_root"])
    judge, about = judge_of(training, benchmark, root, chosen.folder / "judge")
    rows, made, shown = read_prompts(run / "01_prompt_augmentation" / "prompts.csv"), [], {}
    for name in chosen.variants:
        values = resolve(chosen.run, {key: v for key, v in VARIANTS[name].items() if key != PRIOR})[0]
        drawing = step_parameters(notebook_of("03_synthesis"), values)
        values = step_parameters(notebook_of("02_lora_tuning"), values) | {"lora_scale": drawing["lora_scale"]}
        known = {field.name for field in fields(SynthesisOptions)} & drawing.keys()
        options = SynthesisOptions(**{k: tuple(v) if isinstance(v := drawing[k], list) else v for k in known})
        for seed in range(chosen.seeds):
            pipeline, targets = tuned_pipeline(name, values, rows, seed, chosen.folder)
            images, judged = judge_images(pipeline, rows[: chosen.images], benchmark, options, judge)
            previews, captions = range(values["lora_pictures"]), values["lora_captions"]
            texts = [captions[k % len(captions)] for k in previews]
            domain = draw_texts(pipeline, texts, [derive_seed(seed, "lora", "preview", k) for k in previews], values)
            distances = [kernel_distance(latent_features(pipeline, some), targets) for some in (images, domain)]
            row = {"run": base["run"], "variant": name, "images": len(images), "seed": seed}
            row |= dict(zip(("distance", "distance_caption"), distances, strict=True)) | judged
            made.append(row)
            print(*row.values(), sep=", ", flush=True)
            shown[name] = images[:6]
    return pd.DataFrame(made), shown, {"judge": about, "prompts": [row.prompt for row in rows[:6]]}


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run and variant: the number of tunings, and mean and standard deviation over them."""
    found = []
    for (run, name), some in rows.groupby(["run", "variant"], sort=False):
        row = {"run": run, "variant": name, "images": some.images.iloc[0], "seeds": len(some)}
        for column in MEASURES:
            row |= {column: some[column].mean(), f"{column}_spread": some[column].std()}
        found.append(row)
    return pd.DataFrame(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name of a parameter file with target_images, whose run has step 1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=96, help="images of class words, of the run's first prompts")
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, ... of the tuning: more may follow in a later call")
    parser.add_argument("--folder", type=Path, default=project_root() / "results" / "runs" / "lora-variants")
    parser.add_argument("--out", type=Path, default=project_root() / "results")
    chosen = parser.parse_args(arguments)
    rows, shown, about = measure(chosen)
    table, shared = chosen.out / "tables" / "lora_variants_seeds.csv", {"run": chosen.run, "images": chosen.images}
    rows = with_earlier(rows, table, ["run", "variant", "seed"], shared)
    write_text(table, rows.to_csv(index=False, float_format="%.3f"))
    write_text(table.with_name("lora_variants.csv"), means(rows).to_csv(index=False, float_format="%.3f"))
    about = shared | about | {"variants": VARIANTS} | provenance()
    write_text(table.with_name("lora_variants.json"), json.dumps(about, indent=1))
    save_figure(picture_rows(shown), chosen.out / "figures" / "lora_variants.png")


if __name__ == "__main__":
    main()
