"""Export the synthetic set of a run (`diffseg.benchmarks.formats`)."""

from pathlib import Path

import diffseg
from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.formats import FORMATS
from diffseg.errors import DiffsegError
from diffseg.files import read_rows, whole_folder
from diffseg.lab.manifests import read_manifest
from diffseg.lab.runs import trouble, writing
from diffseg.lab.steps import run_folder


def export_set(run: str, form: str, out: Path) -> str:
    """Write a run's synthetic set to `out` in one of FORMATS; return a sentence that says what was written.

    run: the name of a run, or its folder. An export that fails or is interrupted leaves nothing in `out`. Raises a
    DiffsegError where the set is not finished, `out` holds something already or cannot be written, or a package of the
    format is missing.
    """
    source = (Path(run) if Path(run).is_dir() else run_folder(run)) / "03_synthesis"
    if problem := trouble(source):
        raise DiffsegError(f"{run} has no whole synthetic set in {source} ({problem}); run steps 1 to 3 of it first.")
    if out.is_dir() and any(out.iterdir()):
        raise DiffsegError(f"{out} is not empty, and files of two exports would mix; give another --out, or remove it.")
    manifest = read_manifest(source)
    values = manifest["parameters"]
    left_out = len(read_rows(source / "failed.csv"))
    adapters = [values["generator_lora"]] if values["generator_lora"] else []
    adapters += ["tuned in step 2"] if manifest["metrics"]["tuned"] else []
    scale = "" if values["lora_scale"] == 1 else f", scale {values['lora_scale']:g}"
    about = {
        "Generator": values["generator"],
        "LoRA": ", ".join(adapters) + scale if adapters and values["lora_scale"] else "none",
        "Classes": "own words" if values["class_list"] else values["benchmark"],
        "Masks": f"attention to the words, beta {values['beta']}, refiner {values['refiner']}",
        "Left out": f"{left_out} images from which no mask could be cut",
        "Made by": f"diffseg {diffseg.__version__}, run {manifest['run']}",
    }
    benchmark = get_benchmark(values["benchmark"], values["class_list"])
    with writing(out), whole_folder(out) as folder:
        FORMATS[form](source, benchmark, folder, about)
    count = len(read_rows(source / "index.csv"))
    return f"{count} images as {form} in {out}; {left_out} without a mask left out."
