"""The command `diffseg`: run the notebooks of a parameter file or a whole study, or list what there is."""

import argparse
import sys
from pathlib import Path

from diffseg.errors import DiffsegError
from diffseg.lab import processes
from diffseg.lab.manifests import STEPS, read_manifest, run_folder, step_key
from diffseg.lab.parameters import parse_assignments
from diffseg.lab.runs import IN_PROGRESS, run
from diffseg.lab.studies import print_studies, run_study, study_files
from diffseg.paths import project_root


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 one sentence on stderr says why not, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="diffseg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run the steps of a parameter file, skipping what is up to date")
    runner.add_argument("name", help="a name in notebooks/params, such as mini-voc, or a path to a YAML file")
    runner.add_argument("--only", metavar="STEPS", help="step numbers: 3, 3-5 or 1,3")
    runner.add_argument("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="parameters")
    runner.add_argument("--out", metavar="DIR", default="", help="where the run's folder goes (default: results/runs)")
    runner.add_argument("--force", action="store_true", help="make the steps anew even if they are up to date")
    runner.add_argument("--share", action="store_true", help="link what another run has made in the same way")
    commands.add_parser("list", help="list the parameter files and the state of the runs in results/runs")
    several = commands.add_parser("study", help="make the runs of a study and its table; without a name, list them")
    several.add_argument("name", nargs="?", help="a name in notebooks/studies, such as augmentation")
    several.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at the same time; they share the cores")
    arguments = parser.parse_args(argv)
    try:
        if processes.count() > 1 and arguments.command != "run":
            raise DiffsegError(f"diffseg {arguments.command} is one process; start it without a launcher.")
        if processes.rank():
            processes.assist()  # the main process reads the arguments
        elif arguments.command == "list":
            print_list()
        elif arguments.command == "run":
            run(
                arguments.name,
                arguments.only,
                parse_assignments(arguments.set),
                arguments.out,
                arguments.force,
                arguments.share,
            )
        elif arguments.name:
            run_study(arguments.name, arguments.jobs)
        else:
            print_studies()
    except DiffsegError as error:
        print(f"diffseg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndiffseg: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 130
    return 0


def print_list() -> None:
    """Print the parameter files with their first comment, and each step of each run in results/runs."""
    for path in sorted((project_root() / "notebooks" / "params").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{path.stem:24}{first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
    studies = {path.stem for path in study_files()}
    for folder in sorted(path for path in run_folder("any").parent.glob("[!.]*") if path.is_dir()):
        if folder.name in studies:
            continue  # its runs are the affair of `diffseg study`
        print(f"\n{folder}")
        for step in STEPS:
            print(f"  {step:24}{state(folder / step)}")


def state(folder: Path) -> str:
    """Say whether a step is done, stale, unfinished or absent; files are looked for, not hashed."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "unfinished" if (folder / IN_PROGRESS).is_file() else "absent"
    try:
        current = step_key(folder.name, manifest["parameters"], folder.parent) == manifest["key"]
    except DiffsegError:  # its notebook or an upstream step is gone
        current = False
    whole = all((folder / name).is_file() for name in manifest["outputs"])
    return f"{'done' if current and whole else 'stale'}, {manifest['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
