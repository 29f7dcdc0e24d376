"""Which layers should LoRA tune, and how far, so that the domain comes with class words and the masks stay good?

python -m diffseg.experiments.lora_variants mini-cityscapes [--variants self-attention ...] [--seeds 3]
    results/tables/lora_variants.csv (means), lora_variants_seeds.csv (a row a tuning), lora_variants.json,
    results/figures/lora_variants.png and .pdf (images of this call's variants)

Each variant is tuned for all of `lora_steps`, without notebook 02's choice among candidates, and draws the run's own
prompts, with the same seeds for all. The distance of these images to held-out images of the domain says how much of the
domain came, but falls too where named objects vanish; a judge, a network trained on ground-truth masks, says whether
they are there and how good their masks are. It was measured on streets and on scenes, not on images between them.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from scipy.ndimage import label
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.metrics import ConfusionMatrix, mean_iou
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.drawing import batches_of
from diffseg.errors import DiffsegError
from diffseg.experiments.mask_ablation import SMALLEST_OBJECT, as_pixels, reference_label
from diffseg.experiments.oracle import free_scene, picture_label
from diffseg.experiments.paired import named_fields, options_of, recipe_of, score, trained, with_earlier
from diffseg.figures import picture_rows, save_figure
from diffseg.files import atomic_path, sha256_text, write_text
from diffseg.generator import draw, load_generator
from diffseg.lab.batch import resolve, step_parameters
from diffseg.lab.declarations import INERT
from diffseg.lab.manifests import read_manifest
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import named_files, notebook_of
from diffseg.lora import TuningOptions, load_lora, tune
from diffseg.miniworld.cityscapes import BICYCLE_FROM
from diffseg.miniworld.oracle import PICTURE_NAMES, classes_of_pictures
from diffseg.miniworld.scenes import Scene
from diffseg.paths import locate, project_root
from diffseg.pictures import read_picture
from diffseg.prompts import Prompt, read_prompts
from diffseg.seeds import derive_seed
from diffseg.synthesis import SynthesisOptions, draw_with_masks
from diffseg.target_domain import build_captions, find_pictures, fit, hold_out, kernel_distance, latent_features
from diffseg.words import with_article

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
SELF = [f"attn1.{name}" for name in PROJECTIONS]
FEED_FORWARD, CONVOLUTIONS = ["net.0.proj", "net.2"], ["conv1", "conv2"]
BATCH = 8  # images drawn at once; no image depends on it
MEASURES = "distance", "distance_caption", "present", "objects", "complete", "mask_miou"
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
    "self-attention, convolutions, scale 0.5": {"lora_targets": SELF + CONVOLUTIONS, "lora_scale": 0.5},
    "self-attention, a third own images": {"lora_targets": SELF, PRIOR: 1 / 3},
}


class LabelledScenes(Dataset):
    """Two free scenes of the mini world side by side, as wide as a street: (name, image uint8 3 x H x W, label int64).

    Labelled as mini Cityscapes labels its streets: a tram is a train, and the lower part of a cyclist a bicycle.
    """

    def __init__(self, benchmark: Benchmark, name: str, count: int):
        self.name, self.count, self.classes = name, count, benchmark.classes
        self.ids = classes_of_pictures(benchmark)
        self.ids[PICTURE_NAMES.index("tram")] = self.classes.index("train")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        scenes = [free_scene(0, self.name, 2 * index + k) for k in range(2)]
        image = torch.cat([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes], dim=2)
        return f"{self.name}-{index}", image, torch.cat([self.label(scene) for scene in scenes], dim=1)

    def label(self, scene: Scene) -> torch.Tensor:
        classes = self.ids[torch.from_numpy(picture_label(scene))]
        for k, picture in enumerate(scene.objects):
            if picture.word == "cyclist":
                there = torch.from_numpy(scene.instances == k + 1)
                heights = there.any(dim=1).nonzero().flatten()
                middle = heights[0] + round(BICYCLE_FROM * len(heights)) if len(heights) else 0
                classes[middle:][there[middle:]] = self.classes.index("bicycle")
        return classes


def judge_of(parameters: dict, benchmark: Benchmark, root: Path, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Return a network that knows the domain and the mini world's scenes, and its mIoU in % on others of both.

    The images that are judged lie between the two: the oracle alone fails on streets. It is no part of the method.
    """
    real = open_split(benchmark, root, benchmark.training_split)
    scenes = LabelledScenes(benchmark, "judge", len(real))
    options = options_of(parameters | JUDGE, "baseline")
    network = trained(folder, "judge", root.name, parameters, options, ConcatDataset([real, scenes]), benchmark, 0)
    others = {"domain": open_split(benchmark, root, "dev"), "scenes": LabelledScenes(benchmark, "judged", 400)}
    return network.eval(), {name: round(score(network, some, benchmark), 1) for name, some in others.items()}


def own_images(pipeline, rows: Sequence[Prompt], count: int, values: dict, folder: Path) -> list[Path]:
    """Draw `count` images of the prompts' words without the domain's, each with its caption in a .txt beside it; return
    their paths. Tuned on among the domain's images they preserve the prior (Ruiz et al. 2023)."""
    paths = [folder / f"{k:04d}.png" for k in range(count)]
    missing = [k for k, path in enumerate(paths) if not path.with_suffix(".txt").is_file()]
    for part in tqdm(batches_of(missing, BATCH), "drawing own images", unit="batch"):
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
    parts = zip(batches_of(texts, BATCH), batches_of(seeds, BATCH), strict=True)
    return [image for some, theirs in parts for image in draw(pipeline, some, theirs, None, *size)]


def tuned_pipeline(
    share: float, values: dict, pictures: Sequence[Path], rows: Sequence[Prompt], seed: int, folder: Path
):
    """Return a generator under a variant's LoRA, tuned on from where it was stopped, and features of held-out images.

    values: the parameters of notebook 02, and lora_scale. pictures: of the domain. share: of own images among those
    that are tuned on. Variants that differ by their scale alone share a tuning.
    """
    device = PartialState().device
    pipeline = load_generator(values["generator"], device, scheduler=values["generator_scheduler"])
    paths, held_out = hold_out(pictures, values["lora_held_out"], seed)
    size = values["lora_height"], values["lora_width"]
    targets = latent_features(pipeline, [fit(read_picture(path), *size) for path in held_out or paths])
    if values["lora_scale"]:
        if share:
            paths += own_images(pipeline, rows, round(share / (1 - share) * len(paths)), values, folder / "own")
        options = TuningOptions(**named_fields(TuningOptions, values, "lora_"))
        place = folder / sha256_text(json.dumps([share, seed, asdict(options)]))[:12]
        tune(pipeline, paths, values["lora_captions"], options, place, seed)
        load_lora(pipeline, place, values["lora_scale"])
    return pipeline, targets


def judge_images(
    pipeline, rows: Sequence[Prompt], benchmark: Benchmark, options: SynthesisOptions, judge: nn.Module
) -> tuple[list[Image.Image], dict[str, float]]:
    """Draw rows with their masks; return the images and what the judge sees in them.

    present: share of the prompts' classes, in %, of which there is SMALLEST_OBJECT of a square at least, whether from
    the prompt or the domain. objects: mean number of connected parts of that size, of the classes that have one.
    mask_miou: of the masks, in %, the judge's as truth, over the `complete` images where all of the prompt's classes
    are present; other classes are ignored.
    """
    device, ignore, complete = pipeline._execution_device, benchmark.ignore, 0
    images, present, objects, matrix = [], [], [], ConfusionMatrix(benchmark.num_classes, ignore)
    smallest = SMALLEST_OBJECT * options.height**2  # pixels: the same in a wide image as in a square one
    for part in tqdm(batches_of(rows, BATCH), "drawing class words", unit="batch"):
        for row, one in zip(part, draw_with_masks(pipeline, part, benchmark, options), strict=True):
            images.append(one.image)
            with torch.inference_mode():
                seen = judge(as_pixels(one.image)[None].to(device))[0].argmax(dim=0).cpu()
            ids = sorted({benchmark.classes.index(name) for name in row.classes})
            parts = [np.bincount(label(seen == k)[0].flat)[1:] for k in ids]  # pixels of each connected part
            present += [sum(sizes) >= smallest for sizes in parts]
            objects += [count for sizes in parts if (count := sum(sizes >= smallest))]
            if (truth := reference_label(seen, ids, ignore, smallest / seen.numel())) is not None:
                complete += 1
                matrix.update(truth, one.label.cpu())
    found = {"present": 100 * np.mean(present), "objects": np.mean(objects), "complete": complete}
    return images, found | {"mask_miou": 100 * float(mean_iou(matrix.class_sums, "voc"))}


def measure(chosen: argparse.Namespace) -> Iterator[tuple[dict, dict, list[tuple[str, Image.Image]]]]:
    """Tune and judge each variant and seed; yield a row of the table, what rows of one table share, and the first
    images by their words."""
    base, run = resolve(chosen.run, {})
    training = step_parameters(notebook_of("04_robust_training"), base)
    benchmark, root = get_benchmark(base["benchmark"]), data_folder(base["data_root"])
    judge, judged = judge_of(training, benchmark, root, chosen.folder / "judge")
    prompts = read_manifest(run / "01_prompt_augmentation")
    if prompts is None:
        raise DiffsegError(f"{run} has no finished step 1; run `diffseg run {chosen.run} --only 1`.")
    rows = read_prompts(run / "01_prompt_augmentation" / "prompts.csv")
    shared = {"run": chosen.run, "images": chosen.images, "prompts": prompts["key"], "judge": judged}
    tuning = step_parameters(notebook_of("02_lora_tuning"), base)  # what no variant changes is made once
    both = tuning | step_parameters(notebook_of("03_synthesis"), base)
    made_by = "from diffseg import lora, synthesis"
    shared["parameters"] = recipe_of({name: value for name, value in both.items() if name not in INERT}, made_by)
    captions = build_captions(tuning["lora_captions"], tuning["lora_words"])
    pictures = find_pictures(locate("target_images", tuning["target_images"]))
    made_of = named_files({name: tuning[name] for name in ("generator", "target_images")})
    folder = chosen.folder / sha256_text(json.dumps([made_of, prompts["key"], captions]))[:12]
    for name in chosen.variants:
        values = resolve(chosen.run, {key: v for key, v in VARIANTS[name].items() if key != PRIOR})[0]
        drawing = step_parameters(notebook_of("03_synthesis"), values)
        options = SynthesisOptions(**named_fields(SynthesisOptions, drawing))
        values = step_parameters(notebook_of("02_lora_tuning"), values)
        values |= {"lora_scale": drawing["lora_scale"], "lora_captions": captions}
        for seed in range(chosen.seeds if values["lora_scale"] else 1):  # without LoRA all of them are one
            pipeline, targets = tuned_pipeline(VARIANTS[name].get(PRIOR, 0), values, pictures, rows, seed, folder)
            images, found = judge_images(pipeline, rows[: chosen.images], benchmark, options, judge)
            previews = range(values["lora_pictures"])
            texts = [captions[k % len(captions)] for k in previews]
            domain = draw_texts(pipeline, texts, [derive_seed(seed, "lora", "preview", k) for k in previews], values)
            distances = [kernel_distance(latent_features(pipeline, some), targets) for some in (images, domain)]
            row = {"variant": name, "seed": seed} | dict(zip(("distance", "distance_caption"), distances, strict=True))
            shown = [("\n".join(one.words), image) for one, image in zip(rows, images[:6], strict=False)]
            yield row | found, shared, shown


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each variant: the number of tunings, and mean and standard deviation over them."""
    table = rows.groupby("variant", sort=False)[list(MEASURES)].agg(["mean", "std"])
    table.columns = [name if kind == "mean" else f"{name}_spread" for name, kind in table.columns]
    table.insert(0, "tunings", rows.groupby("variant", sort=False).size())
    return table.reset_index()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name of a parameter file with target_images, whose run has step 1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=96, help="images of class words, of the run's first prompts")
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, ... of the tuning: more may follow in a later call")
    parser.add_argument("--folder", type=Path, default=project_root() / "results" / "runs" / "lora-variants")
    parser.add_argument("--out", type=Path, default=project_root() / "results")
    chosen = parser.parse_args(arguments)
    table, shown = chosen.out / "tables" / "lora_variants_seeds.csv", {}
    for row, shared, images in measure(chosen):
        print(*row.values(), sep=", ", flush=True)
        rows = with_earlier(pd.DataFrame([row]), table, ["variant", "seed"], shared)
        write_text(table, rows.to_csv(index=False, float_format="%.3f"))
        write_text(table.with_name("lora_variants.csv"), means(rows).to_csv(index=False, float_format="%.3f"))
        write_text(table.with_name("lora_variants.json"), json.dumps(shared | provenance(), indent=1))
        shown[row["variant"]] = [image for _, image in images]
        words = [titles for titles, _ in images]
    save_figure(picture_rows(shown, words), chosen.out / "figures" / "lora_variants.png")


if __name__ == "__main__":
    main()
