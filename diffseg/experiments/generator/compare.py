"""What limits the mini generator? Small controlled comparisons, judged by the oracle as `measure` judges.

    python -m diffseg.experiments.generator.compare sampling    schedulers, steps and guidance of the shipped weights
    python -m diffseg.experiments.generator.compare training    short trainings from nothing, one thing changed

Tables: results/tables/generator_sampling.csv and generator_training_<samples>.csv; the JSON beside says what the rows
were made from. A row is written as soon as it is measured, and kept by the next call. All rows have the same prompts
and seeds, so rows differ by less than their standard errors (of 105 pictures at 0.9: 0.03; of 60 pairs at 0.6: 0.06).

Not compared: the size of the pictures.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from diffseg.benchmarks.classes import VOC
from diffseg.errors import DiffsegError
from diffseg.experiments.generator import pretrain
from diffseg.experiments.generator.asked import Asked, class_words, pair_prompts, single_prompts
from diffseg.experiments.generator.heldout import held_out
from diffseg.experiments.generator.measure import draw_and_judge, summarise
from diffseg.experiments.generator.pretrain import trainings
from diffseg.experiments.speed import time_in_turn
from diffseg.files import atomic_path, read_rows, sha256_file, write_rows, write_text
from diffseg.generator import load_generator, locate_generator
from diffseg.lab.manifests import read_json
from diffseg.lab.provenance import as_json, provenance
from diffseg.miniworld.oracle import WEIGHTS, load_oracle
from diffseg.paths import project_root
from diffseg.synthesis import SynthesisOptions, draw_with_masks

COLUMNS = "class_present both_present own_picture_hyponyms background mask_iou mask_iou_object mask_iou_pairs".split()
TIMED = 4  # pictures, one batch
BETA = 0.2  # the paper's, by which the tables were begun; the notebooks and `measure` cut at 0.4

# "dpm++ trailing" is the mini generator's own, "dpm++" what diffseg.generator gives Stable Diffusion. By "leading"
# spacing 12 steps begin at noise level 913 of 999, by "trailing" at 999, where training saw almost no signal (Lin et
# al. 2023, arXiv 2305.08891).
SCHEDULERS = {
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "timestep_spacing": "leading"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading"}),
    "dpm++ trailing": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"}),
}


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn: the columns that identify a row; the defaults are those of the notebooks."""

    scheduler: str = "dpm++ trailing"
    steps: int = 8
    guidance: float = 4.0

    def options(self) -> SynthesisOptions:
        """Masks are cut from the later half of the steps, before any refiner, as in the notebooks."""
        later = f"{self.steps // 2}-{self.steps - 1}"
        return SynthesisOptions(64, 64, self.steps, self.guidance, (16,), later, BETA, "none")

    def apply(self, pipeline: StableDiffusionPipeline) -> None:
        kind, settings = SCHEDULERS[self.scheduler]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)


def grid(schedulers: list[str], steps: list[int], guidances: list[float]) -> list[Sampling]:
    """Return all combinations, those first that differ from the default in the fewest things."""
    base = asdict(Sampling())
    every = [Sampling(scheduler, n, w) for scheduler in schedulers for n in steps for w in guidances]
    return sorted(every, key=lambda one: sum(value != base[name] for name, value in asdict(one).items()))


# What each variant changes: settings of a network, nothing (does a training repeat?), "seed" (how far do equal recipes
# lie apart?), "pair_share", or by what factor "samples" are more. "vae": a VAE of its own, trained as long as the rest;
# its base is the one that changes no setting. The middle of the UNet (4 x 4) has attention in all of them.
VARIANTS: dict[str, dict] = {
    "base": {},
    "base again": {},
    "other seed": {"seed": 1},
    "text encoder of 1 layer": {"text_encoder": {"num_hidden_layers": 1}},
    "text encoder of 4 layers": {"text_encoder": {"num_hidden_layers": 4}},
    "two layers a block": {"unet": {"layers_per_block": 2}},
    "UNet 0.75 as wide": {"unet": {"block_out_channels": (48, 96, 144)}},
    "UNet 1.5 times as wide": {"unet": {"block_out_channels": (96, 192, 288)}},
    "no attention at 8 x 8": {
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        }
    },
    "attention at 4 x 4": {
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        }
    },
    "cosine noise": {"scheduler": {"beta_schedule": "squaredcos_cap_v2"}},
    "epsilon": {"scheduler": {"prediction_type": "epsilon"}},
    "pair share 0.3": {"pair_share": 0.3},
    "half the samples": {"samples": 0.5},
    "twice the samples": {"samples": 2},
    "four times the samples": {"samples": 4},
    "VAE trained anew": {"vae": {}},
    "latents of 4 channels": {"vae": {"latent_channels": 4}, "unet": {"in_channels": 4, "out_channels": 4}},
    "latents of 16 channels": {"vae": {"latent_channels": 16}, "unet": {"in_channels": 16, "out_channels": 16}},
}


# ---------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judge:
    """The oracle and the prompts that every row of a table is judged by."""

    oracle: torch.nn.Module
    singles: list[Asked]
    pairs: list[Asked]

    def numbers(self, pipeline: StableDiffusionPipeline, sampling: Sampling) -> dict[str, float | None]:
        """Draw and judge all prompts; see `measure.summarise`. Shares in 0..1, None where no prompt asks for it."""
        sampling.apply(pipeline)
        single = draw_and_judge(pipeline, self.oracle, self.singles, sampling.options(), ())
        found = summarise(single, draw_and_judge(pipeline, self.oracle, self.pairs, sampling.options(), ()))
        return {name: None if found[name] is None else round(found[name], 4) for name in COLUMNS}

    def drawing(self, pipeline: StableDiffusionPipeline, sampling: Sampling) -> Callable[[], None]:
        """Return a call that draws TIMED pictures with masks."""

        def call() -> None:
            sampling.apply(pipeline)
            draw_with_masks(pipeline, [one.prompt for one in self.singles[:TIMED]], VOC, sampling.options())

        return call


def speed(this: Callable, reference: Callable, pictures: int, on_cpu: bool) -> dict[str, float]:
    """Return pictures a second (wall time, the best of three) and how many times as fast as the reference that is.

    The two are called in turn. On a CPU the ratio is of CPU seconds, which other processes disturb less.
    """
    times = time_in_turn({"reference": reference, "this": this}, repetitions=3)
    ratios = [was[on_cpu] / now[on_cpu] for was, now in zip(times["reference"], times["this"], strict=True)]
    best = min(wall for wall, _ in times["this"])
    return {"pictures_per_second": round(pictures / best, 2), "speed": round(statistics.median(ratios), 2)}


def make_judge(options: argparse.Namespace) -> Judge:
    """Ask for `options.pictures` words, spread evenly over all of them, and for `options.pairs` pairs."""
    words = len(class_words())
    asked = single_prompts(max(options.pictures, words), options.seed)
    chosen = np.linspace(0, len(asked), options.pictures, endpoint=False).astype(int)
    pairs = pair_prompts(options.pairs, options.seed)
    return Judge(load_oracle(options.oracle).to(options.device), [asked[k] for k in chosen], pairs)


def origin(options: argparse.Namespace) -> dict:
    """Return what rows of either table must have in common to be compared."""
    common = {name: getattr(options, name) for name in ("pictures", "pairs", "seed")}
    return common | {"beta": BETA, "oracle": weights_of(options.oracle)}


def weights_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weights file under a folder."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))}


# ---------------------------------------------------------------------------------------------- tables


def read_table(path: Path, made_from: dict) -> list[dict[str, str]]:
    """Return the rows that are there. Raises a DiffsegError where they were made from anything else."""
    if not path.is_file():
        return []
    about = read_json(path.with_suffix(".json")) or {}
    before, now = about.get("made_from", {}), as_json(made_from)
    if before != now:
        names = [name for name in now if now[name] != before.get(name)]
        raise DiffsegError(f"{path} was made with other {', '.join(names)}; move it away or choose another --results")
    return read_rows(path)


def write_table(path: Path, rows: list[dict], made_from: dict) -> None:
    about = {"made_from": made_from} | provenance()
    write_text(path.with_suffix(".json"), json.dumps(as_json(about), indent=1) + "\n")
    write_rows(path, rows)


def find_row(rows: list[dict], of: dict) -> dict | None:
    """Return the row that has these values; a table that was read holds text only."""
    return next((row for row in rows if all(str(row[name]) == str(value) for name, value in of.items())), None)


# ---------------------------------------------------------------------------------------------- sampling


def compare_sampling(options: argparse.Namespace) -> Path:
    """Measure every combination of schedulers, steps and guidance; return the table's path.

    speed: pictures a second over those of the default (8 steps of dpm++ trailing), whatever the guidance, which costs
    nothing.
    """
    path = options.results / "tables" / "generator_sampling.csv"
    made_from = origin(options) | {"generator": weights_of(Path(locate_generator(options.generator)))}
    made_from["reference"] = asdict(Sampling())
    rows = read_table(path, made_from)
    todo = [one for one in grid(options.schedulers, options.steps, options.guidance) if not find_row(rows, asdict(one))]
    if not todo:
        return path
    judge, pipeline = make_judge(options), load_generator(options.generator, options.device)
    reference, speeds = judge.drawing(pipeline, Sampling()), {}
    for number, sampling in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {sampling}", flush=True)
        kind = (sampling.scheduler, sampling.steps)
        if kind not in speeds:
            timed = min(TIMED, options.pictures)
            speeds[kind] = speed(judge.drawing(pipeline, sampling), reference, timed, options.device == "cpu")
        rows.append(asdict(sampling) | judge.numbers(pipeline, sampling) | speeds[kind])
        write_table(path, rows, made_from)
    return path


# ---------------------------------------------------------------------------------------------- training


def corpus_of_pair_share(corpus: Path, folder: Path, share: float) -> Path:
    """Make a corpus of the same scenes but fewer pairs, so that they are `share` of it; return its folder.

    All scenes of one object are kept, and the first pairs; so it is smaller than `corpus`, too.
    """
    captions = json.loads((corpus / "captions.json").read_text(encoding="utf-8"))
    is_pair = np.array([" and " in caption for caption in captions])
    allowed = round(share / (1 - share) * (~is_pair).sum())
    kept = np.flatnonzero(~is_pair | (is_pair.cumsum() <= allowed))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "decoder"):
        if (corpus / name).is_dir() and not (folder / name).is_symlink():
            (folder / name).symlink_to((corpus / name).resolve())
    with atomic_path(folder / "latents.npy") as path:
        np.save(path, np.load(corpus / "latents.npy", mmap_mode="r")[kept])
    write_text(folder / "captions.json", json.dumps([captions[k] for k in kept]))
    return folder


def corpus_of_vae(corpus: Path, folder: Path, options: argparse.Namespace, changes: dict) -> Path:
    """Train another VAE on the same pictures and cache its latents; return the new corpus's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images.npy", "captions.json"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to((corpus / name).resolve())
    if not (folder / "vae" / "vae.json").is_file():
        pretrain.train_vae(folder / "vae", folder, options, changes)
    return folder


def train_variant(name: str, folder: Path, corpus: Path, options: argparse.Namespace) -> tuple[Path, dict]:
    """Train one variant by `pretrain.train_diffusion`; return the folder of its weights, and samples and seconds.

    options: those of `pretrain`. A training that was cut goes on; one that is finished is not repeated.
    """
    changes = dict(VARIANTS[name])
    steps = round(options.steps * changes.pop("samples", 1))
    options = argparse.Namespace(**vars(options) | {"seed": changes.pop("seed", options.seed), "steps": steps})
    if "pair_share" in changes:
        corpus = corpus_of_pair_share(corpus, folder / "corpus", changes.pop("pair_share"))
    if "vae" in changes:
        corpus = corpus_of_vae(corpus, folder / "corpus", options, changes.pop("vae"))
    pretrain.train_diffusion(folder, corpus, options, changes)
    pretrain.export(folder, corpus, folder / "weights", changes)
    note = json.loads((folder / "weights" / "training.json").read_text(encoding="utf-8"))
    return folder / "weights", {"samples": note["samples_seen"], "seconds": note["seconds"]}


def compare_training(options: argparse.Namespace) -> Path:
    """Train every variant on `options.samples`, by the same schedule; judge them all; return the table's path.

    parameters: of UNet and text encoder. psnr_scenes, loss_scenes, mask_iou_scenes: see `heldout`. speed: of drawing on
    the CPU, where the mini world is drawn; pictures a second over those of the shipped generator, which stands in the
    first row. Calls for different variants may run at the same time.
    """
    path = options.results / "tables" / f"generator_training_{options.samples}.csv"
    if not (options.corpus / "latents.npy").is_file():
        raise DiffsegError(
            f"there are no latents in {options.corpus}; run the stages corpus and vae of "
            f"python -m diffseg.experiments.generator.pretrain with --folder {options.corpus}"
        )
    recipe = ["diffusion", "--batch", str(options.batch), "--seed", str(options.seed), "--device", options.device]
    recipe += ["--precision", options.precision] if options.precision else []
    recipe += ["--compile"] if options.compile else []
    training = pretrain.parse_options(recipe)
    training.steps = options.samples // options.batch
    made_from = origin(options) | {"sampling": asdict(Sampling())}
    made_from |= {
        name: getattr(training, name) for name in ("steps", "batch", "rate", "decay", "device", "precision", "compile")
    }
    made_from["captions"] = sha256_file(options.corpus / "captions.json")
    rows = read_table(path, made_from)
    names = [name for name in ("shipped", *options.variants) if not find_row(rows, {"variant": name})]
    if not names:
        return path
    judge, shipped = make_judge(options), load_generator("mini", options.device)
    for name in names:
        if name == "shipped":
            parts = trainings(read_json(Path(locate_generator("mini")) / "training.json"))
            used = {"samples": sum(part["samples_seen"] for part in parts)}
            pipeline, used["seconds"] = shipped, round(sum(part["seconds"] for part in parts), 1)
        else:
            folder = options.folder / name.replace(" ", "-")
            weights, used = train_variant(name, folder, options.corpus, training)
            pipeline = load_generator(str(weights), options.device)
        networks = (pipeline.unet, pipeline.text_encoder)
        row = {"variant": name, "parameters": sum(p.numel() for one in networks for p in one.parameters()), **used}
        known = held_out(pipeline, judge.singles, BETA, options.seed)
        row |= {f"{measure}_scenes": round(value, 4) for measure, value in known.items()}
        row |= judge.numbers(pipeline, Sampling())
        drawings = judge.drawing(pipeline.to("cpu"), Sampling()), judge.drawing(shipped.to("cpu"), Sampling())
        row |= speed(*drawings, min(TIMED, options.pictures), on_cpu=True)
        rows = read_table(path, made_from)
        if not find_row(rows, {"variant": name}):  # another call may have measured it meanwhile
            write_table(path, [*rows, row], made_from)
    return path


# ---------------------------------------------------------------------------------------------- command line


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--oracle", type=Path, default=WEIGHTS / "oracle", help="the oracle's folder")
    common.add_argument("--results", type=Path, default=project_root() / "results", help="where to write")
    common.add_argument("--pictures", type=int, default=105, help="pictures of one object: one for every word")
    common.add_argument("--pairs", type=int, default=60, help="pictures of two objects")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sampling", parents=[common])
    sampling.add_argument("--generator", default="mini", help="a name or a folder")
    sampling.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    sampling.add_argument("--steps", nargs="+", type=int, default=[6, 8, 10, 12, 20])
    sampling.add_argument("--guidance", nargs="+", type=float, default=[2.0, 4.0, 6.0, 8.0])
    training = commands.add_parser("training", parents=[common])
    training.add_argument("--samples", type=int, default=16000, help="of training, for each variant")
    training.add_argument("--corpus", type=Path, default=Path("results/runs/pretrain"), help="a folder of pretrain")
    training.add_argument("--folder", type=Path, default=Path("results/runs/generator-training"), help="of the trials")
    training.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    training.add_argument("--batch", type=int, default=32)
    training.add_argument("--precision", choices=["fp32", "bf16"], help="as of pretrain")
    training.add_argument("--compile", action="store_true", help="as of pretrain")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    path = compare_sampling(options) if options.command == "sampling" else compare_training(options)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
