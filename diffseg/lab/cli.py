"""The command `diffseg`: run a parameter file's notebooks or a study, list, publish, clean up, predict and export."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.lab import processes
from diffseg.lab.batch import run
from diffseg.lab.cleaning import clean
from diffseg.lab.manifests import read_manifest
from diffseg.lab.parameters import parse_assignments
from diffseg.lab.runs import trouble, writing
from diffseg.lab.steps import STEPS, linked_keys, results_folder, step_key
from diffseg.lab.studies import print_studies, run_study, study_files
from diffseg.lab.working_copy import entry, init
from diffseg.paths import from_home, project_root

MAC = "diffseg was never run on macOS; if its GPU (MPS) lacks an operation, ACCELERATE_TORCH_DEVICE=cpu takes the CPU"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill."""


def terminate(*_: Any) -> None:
    raise Terminated


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command and its options; wrong ones end the process with argparse's message."""
    parser = argparse.ArgumentParser(prog="diffseg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run the notebooks of a parameter file; what is finished is not made anew")
    runner.add_argument("name", help="a name in notebooks/params, such as mini-voc, or a path to a YAML file")
    runner.add_argument("--only", metavar="NUMBERS", help="numbers of notebooks: 3, 3-5 or 1,3")
    runner.add_argument("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="parameters")
    runner.add_argument("--out", metavar="DIR", default="", help="folder of steps and runs (default: results)")
    runner.add_argument("--force", action="store_true", help="execute notebooks of finished steps again: figures and "
                        "executed notebooks are made anew, in 2 its images, too, in 5 predictions")  # fmt: skip
    runner.add_argument("--shard", metavar="K/N", default="", help="with --only 3: the K-th of N parts (job arrays)")
    runner.add_argument("--verify", action="store_true", help="hash every file of finished steps")
    starter = commands.add_parser("init", help="write the notebooks and parameter files to a folder, to work there")
    starter.add_argument("folder", metavar="FOLDER")
    commands.add_parser("list", help="list the parameter files and the state of the runs in results/runs")
    several = commands.add_parser("study", help="make the runs of a study and its table; without a name, list them")
    several.add_argument("name", nargs="?", help="a name in notebooks/studies, such as scaling")
    several.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at the same time; they share the cores")
    cleaner = commands.add_parser("clean", help="list the steps that no run refers to, and remove them when you agree")
    cleaner.add_argument("--yes", action="store_true", help="remove them without asking")
    cleaner.add_argument("--out", metavar="DIR", default="", help="folder of steps and runs (default: results)")
    publisher = commands.add_parser("publish", help="copy a run's numbers and notebooks to results/, fill the README")
    publisher.add_argument("run", nargs="?", type=Path, help="such as results/runs/mini-voc; without, the README and "
                           "the pages that are older than their notebook or data")  # fmt: skip
    publisher.add_argument("--check", action="store_true", help="write nothing, only list the old pages")
    predictor = commands.add_parser("predict", help="masks, overlays and class areas of any images")
    predictor.add_argument("network", help="folder of a trained network (RUN/04_robust_training/synthetic), or hub id")
    predictor.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, and folders of images")
    predictor.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="comes to hold masks/, overlays/, areas.csv"
    )
    predictor.add_argument("--side", metavar="PIXELS", type=int, help="shorter side at which the network sees "
                           "an image (default: that of its training; 0: the image's own size)")  # fmt: skip
    predictor.add_argument("--batch", metavar="N", type=int, default=8, help="images of one size seen at once")
    exporter = commands.add_parser("export", help="a network as ONNX, or the synthetic set of a run for other trainers")
    exporter.add_argument("source", help="with --onnx a network as for predict, with --format a run's name or folder")
    target = exporter.add_mutually_exclusive_group(required=True)
    target.add_argument("--onnx", metavar="FILE", type=Path, help="the file to write")
    target.add_argument("--format", choices=("coco", "yolo", "hf"), help="COCO, YOLO, or a Hugging Face data set")
    exporter.add_argument("--out", metavar="DIR", type=Path, help="with --format: a new folder")
    arguments = parser.parse_args(argv)
    if arguments.command == "export" and bool(arguments.format) != bool(arguments.out):
        parser.error("export takes --format with --out, and --onnx without it")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 one sentence on stderr says why not, 130 interrupted, 143 terminated."""
    arguments = read_arguments(argv)
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        if processes.count() > 1 and arguments.command != "run":
            raise DiffsegError(f"diffseg {arguments.command} is one process; start it without a launcher.")
        if processes.rank():
            processes.assist()  # the main process reads the arguments
        elif arguments.command == "init":
            print(f"{entry(init(arguments.folder))} and run diffseg there, as in: diffseg run smoke")
        elif arguments.command == "list":
            print_list()
        elif arguments.command == "run":
            if sys.platform == "darwin":
                print(MAC)
            changes = parse_assignments(arguments.set)
            run(arguments.name, arguments.only, changes, arguments.out, arguments.force, arguments.shard,
                arguments.verify)  # fmt: skip
        elif arguments.command == "clean":
            clean(str(from_home(arguments.out).absolute()) if arguments.out else "", arguments.yes)
        elif arguments.command == "publish":
            from diffseg.lab.old_pages import old_pages
            from diffseg.lab.publishing import publish  # here: others need not wait for pandas

            if not arguments.check:
                publish(arguments.run)
            old = old_pages()
            for page, changed in old.items():
                step, made = page.stem, f"results/runs/{page.parent.name}"
                again = f"diffseg run {page.parent.name} --force"
                if step not in STEPS:  # 00 and 07, outside the chain
                    again = f"papermill notebooks/{step}.ipynb {made}/notebooks/{step}.ipynb"
                print(f"{page} is older than {', '.join(changed)}; run {again}, then diffseg publish {made}")
            return int(arguments.check and bool(old))
        elif arguments.command == "predict":
            predict(arguments)
        elif arguments.command == "export":
            export(arguments)
        elif arguments.name:
            from diffseg.lab.study_results import write_results  # here: others need not wait for matplotlib

            run_study(arguments.name, arguments.jobs, write_results)
        else:
            print_studies()
    except DiffsegError as error:
        print(f"diffseg: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder of somebody else's
        print(f"diffseg: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        is_term = isinstance(error, Terminated)
        what = "terminated" if is_term else "interrupted"
        resumes = "continues where it stopped" if arguments.command in ("run", "study") else "starts again"
        print(f"\ndiffseg: {what}; the same command {resumes}.", file=sys.stderr)
        return 143 if is_term else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def predict(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState  # here: other commands need not wait for torch

    from diffseg.inference import predict_files
    from diffseg.segmenters import load_segmenter

    network = load_segmenter(arguments.network).to(PartialState().device)  # a GPU if there is one
    with writing(arguments.out):
        count = predict_files(network, arguments.pictures, arguments.out, arguments.side, arguments.batch)
    print(f"{count} images: masks, overlays and areas.csv in {arguments.out}")


def export(arguments: argparse.Namespace) -> None:
    if arguments.format:
        from diffseg.lab.exporting import export_set  # here: other commands need not wait for torch

        print(export_set(arguments.source, arguments.format, arguments.out))
        return
    from diffseg.onnx_files import export_onnx
    from diffseg.segmenters import load_segmenter

    network = load_segmenter(arguments.source)
    with writing(arguments.onnx):
        difference = export_onnx(network, arguments.onnx)
    print(f"{arguments.onnx}; ONNX Runtime's logits differ from PyTorch's by {difference:.1g} of the largest one.")


def print_list() -> None:
    """Print the parameter files with their first comment, and each step of each run in results/runs."""
    for path in sorted((project_root() / "notebooks" / "params").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{path.stem:24}{first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
    studies = {path.stem for path in study_files()}  # their runs are the affair of `diffseg study`
    runs = results_folder() / "runs"
    for folder in sorted(path for pattern in ("[!.]*", "[!.]*/[!.]*") for path in runs.glob(pattern)):
        if linked_keys(folder) and folder.relative_to(runs).parts[0] not in studies:
            print(f"\n{folder}")
            for step in STEPS:
                print(f"  {step:24}{state(folder, step)}")


def state(run: Any, step: str) -> str:
    """Say whether a run's step is done, of other parameters or code than today's, unfinished or absent."""
    if not (run / step).exists():
        return "absent"
    try:
        manifest = read_manifest(run / step)
        if manifest is None or (problem := trouble(run / step)):
            return f"unfinished{f': {problem}' if manifest else ''}"
        is_current = step_key(step, manifest["parameters"], linked_keys(run)) == manifest["key"]
    except DiffsegError as error:
        return str(error)
    return f"{'done' if is_current else 'of other code or earlier steps'}, {manifest['seconds']:.0f} s"
