"""What a step of many files costs: finishing it, and deciding that it is up to date.

python -m diffseg.experiments.speed.steps --files 500000    writes results/benchmarks/steps.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from diffseg.files import MANIFEST, write_text
from diffseg.lab.manifests import LISTING, damage, read_manifest, write_manifest
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root


def measure(folder: Path, count: int) -> dict[str, float]:
    """Write `count` small files to a folder and return seconds and bytes of its manifest, as a step would have."""
    names = [f"{k // 1000:04d}/{k % 1000:03d}.png" for k in range(count)]
    for name in tqdm(names, "writing small files"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    content = {"step": "speed", "key": "0", "parameters": {}, "metrics": {}}
    seconds = {}

    def timed(name: str, call) -> None:
        start = time.perf_counter()
        call()
        seconds[f"seconds_{name}"] = round(time.perf_counter() - start, 2)

    timed("finish", lambda: write_manifest(folder, names, content))
    manifest = read_manifest(folder)
    timed("up_to_date", lambda: damage(folder, manifest))
    timed("verify", lambda: damage(folder, manifest, verify=True))
    sizes = {"manifest_bytes": (folder / MANIFEST).stat().st_size, "listing_bytes": (folder / LISTING).stat().st_size}
    return {"files": count} | seconds | sizes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500_000)
    parser.add_argument("--out", type=Path, default=project_root() / "results" / "benchmarks" / "steps.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options.files) | provenance()
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    print({name: value for name, value in report.items() if not isinstance(value, dict)})


if __name__ == "__main__":
    main()
