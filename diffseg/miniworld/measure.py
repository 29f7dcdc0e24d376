"""How good is the mini generator? Numbers, by an oracle that has seen true masks; a diagnostic, no part of the method.

python -m diffseg.miniworld.measure oracle       train the oracle on scenes that no benchmark uses
python -m diffseg.miniworld.measure generator    draw single-object pictures and judge them: results/mini_generator.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from diffseg.benchmarks import VOC
from diffseg.datasets import open_split
from diffseg.evaluation import evaluate
from diffseg.figures import overlay, picture_rows, save_figure
from diffseg.files import atomic_path
from diffseg.generator import load_generator, locate_generator
from diffseg.manifest import git_state, hardware, project_root, versions
from diffseg.miniworld.disk import locate_data
from diffseg.miniworld.scenes import PLACES, article, load_pictures, sample_scene
from diffseg.prompts import Prompt
from diffseg.seeds import derive_seed
from diffseg.segmenters import Segmenter, load_segmenter, save_segmenter
from diffseg.synthesis import Drawn, SynthesisOptions, draw_with_masks
from diffseg.training import TrainingOptions, train

CLASS_IDS = {name: k for k, name in enumerate(VOC.classes)}


class Scenes(Dataset):
    """Endless captioned-corpus scenes with true masks, drawn on the fly; no benchmark has their seeds."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(derive_seed(self.seed, "oracle", index))
        scene = sample_scene(rng, even=True, classes_only=True)
        label = torch.from_numpy(scene.label(CLASS_IDS)).long()
        return f"oracle_{index}", torch.from_numpy(scene.image).permute(2, 0, 1), label


def train_oracle(folder: Path, options: argparse.Namespace) -> None:
    """Train the oracle and write it with its mIoU on mini VOC val."""
    torch.manual_seed(options.seed)
    oracle = Segmenter("unet-resnet18", VOC.classes)
    training = TrainingOptions(options.iterations, 32, 64, (0.8, 1.2), 0.2, 1.5e-3, 1e-4, options.precision, 0)
    scenes = Scenes(options.iterations * 32, options.seed)
    train(oracle, scenes, VOC.ignore, training, options.seed, options.device, "training the oracle")
    save_segmenter(oracle, folder)
    result = evaluate(oracle, open_split(VOC, locate_data("mini"), "val"), VOC, batch_size=32, device=options.device)
    with atomic_path(folder / "oracle.json") as path:
        path.write_text(json.dumps({"miou": result.miou, "samples": len(scenes), "iou": result.iou}, indent=1))
    print(f"the oracle's mIoU on mini VOC val: {result.miou:.3f}")


def single_object_prompts(count: int, seed: int) -> list[Prompt]:
    """Return prompts that name one object each: every word of every VOC class in turn, on every place in turn."""
    pictures = [picture for picture in load_pictures() if picture.voc_class]
    named = [(picture, word) for picture in pictures for word in picture.words]
    prompts = []
    for k in range(count):
        picture, word = named[k % len(named)]
        start = f"a photo of {article(word)}"
        prompt = f"{start} {list(PLACES)[k % len(PLACES)]}"
        span = (len(start) - len(word), len(start))
        relation = "plain" if picture.typical and word == picture.word else "other"
        seeds = derive_seed(seed, "measure", picture.voc_class, k)
        prompts.append(Prompt(k, prompt, (picture.voc_class,), (word,), (span,), (relation,), (0,), "", seeds))
    return prompts


def judge(prompt: Prompt, drawn: Drawn, seen: torch.Tensor) -> dict:
    """Compare a picture with what the oracle sees in it (int64 H x W)."""
    class_id = CLASS_IDS[prompt.classes[0]]
    areas = torch.bincount(seen.flatten(), minlength=VOC.num_classes)[1:]
    mask = drawn.label == class_id

    def iou(truth: torch.Tensor) -> float:
        union = (mask | truth).sum().item()
        return (mask & truth).sum().item() / union if union else 0.0

    return {
        "class": prompt.classes[0],
        "word": prompt.words[0],
        "relation": prompt.relations[0],
        "present": bool(areas.max() > 0 and areas.argmax() + 1 == class_id),
        "iou": iou(seen == class_id),
        "iou_object": iou(seen > 0),
    }


def mean_of(rows: list[dict], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def measure_generator(folder: Path, options: argparse.Namespace) -> None:
    """Write results/mini_generator.json and the sheets of best and worst pictures.

    class_present: share of single-object pictures in which the prompted class is the largest object that the oracle
    sees. mask_iou: mean IoU of the attention mask (before any refiner) with the oracle's mask of that class, 0 where it
    sees none of it; mask_iou_object: the same with the oracle's mask of all objects, whatever class it takes them for.
    """
    oracle = load_segmenter(folder).to(options.device)
    pipeline = load_generator("mini", options.device)
    synthesis = SynthesisOptions(
        64, 64, options.sampling_steps, options.guidance, (16,), options.attention_steps, options.beta, "none"
    )
    prompts = single_object_prompts(options.pictures, options.seed)
    rows, pictures = [], []
    for start in tqdm(range(0, len(prompts), 20), "judging pictures", unit="batch"):
        batch = prompts[start : start + 20]
        drawn = draw_with_masks(pipeline, batch, VOC, synthesis)
        images = torch.stack([torch.from_numpy(np.array(one.image)).permute(2, 0, 1) for one in drawn])
        with torch.inference_mode():
            seen = oracle(images.float().to(options.device) / 255).argmax(dim=1).cpu()
        rows += [judge(prompt, one, label) for prompt, one, label in zip(batch, drawn, seen, strict=True)]
        pictures += [(one.image, one.label) for one in drawn]
    plain = [row for row in rows if row["relation"] == "plain"]
    classes = sorted({row["class"] for row in rows}, key=CLASS_IDS.get)
    weights = Path(locate_generator("mini"))
    root = project_root()
    report = {
        "class_present": mean_of(rows, "present"),
        "mask_iou": mean_of(rows, "iou"),
        "mask_iou_object": mean_of(rows, "iou_object"),
        "class_present_plain_words": mean_of(plain, "present"),
        "mask_iou_plain_words": mean_of(plain, "iou"),
        "mask_iou_object_plain_words": mean_of(plain, "iou_object"),
        "pictures": len(rows),
        "sampling": {
            name: getattr(options, name) for name in ("sampling_steps", "guidance", "attention_steps", "beta", "seed")
        },
        "oracle": json.loads((folder / "oracle.json").read_text()) | {"iou": None},
        "per_class": {
            name: {
                key: mean_of([row for row in rows if row["class"] == name], key)
                for key in ("present", "iou", "iou_object")
            }
            for name in classes
        },
        "training": json.loads((weights / "training.json").read_text()),
        "measured_on": hardware(),
        "versions": versions(),
        "git": git_state(root),
    }
    with atomic_path(root / "results" / "mini_generator.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    order = np.argsort([row["iou"] for row in rows])
    for name, chosen in (("worst", order[:24]), ("best", order[::-1][:24]), ("usual", np.arange(24))):
        half = [chosen[:12], chosen[12:]]
        figure = picture_rows(
            {
                f"{name} {12 * part + 1}+ {what}": [
                    np.asarray(pictures[k][0])
                    if what == "drawn"
                    else overlay(np.asarray(pictures[k][0]), pictures[k][1], VOC.palette)
                    for k in half[part]
                ]
                for part in range(2)
                for what in ("drawn", "mask")
            },
            size=0.8,
        )
        save_figure(figure, root / "results" / "figures" / f"mini_generator_{name}.png")
    print(json.dumps({key: report[key] for key in list(report)[:6]}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["oracle", "generator"])
    parser.add_argument("--folder", type=Path, default=Path("results/runs/oracle"), help="the oracle's folder")
    parser.add_argument("--iterations", type=int, default=1500, help="of the oracle's training, 32 scenes each")
    parser.add_argument("--precision", default="fp32", help="of the oracle's training: fp32 or bf16")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures to judge")
    parser.add_argument("--sampling-steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--attention-steps", default="7-14", help="denoising steps whose attention is averaged")
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    (train_oracle if options.stage == "oracle" else measure_generator)(options.folder, options)


if __name__ == "__main__":
    main()
