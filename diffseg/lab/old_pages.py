"""Which pages of results/notebooks are older than their notebook or their data: a page notes what it was made from.

That is the notebook's cells, the manifest of the run's step, and the files of results/ that code cells open. A number
in the text stands in the cells, where a test ties it to its file (`diffseg.lab.quoted`), so that file is not noted.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffseg.files import MANIFEST, sha256_file, sha256_text
from diffseg.lab.parameters import read_cells
from diffseg.lab.steps import STEPS, run_folder, without_comments
from diffseg.paths import project_root

OPENED = re.compile(r'project_root\(\) / "results"(?: / "[^"]+")+')  # in a code cell
NOTED = re.compile(r'<meta content="(\S+) ([0-9a-f]{64})" name="made-from"/>')  # page.html.j2, as nbconvert writes it


def take_prose(cells: Sequence[dict], step: str) -> None:
    """Give an executed notebook's cells the text and the comments of today's notebook, cell by cell by their ids; in
    place. Code that differs in more than comments stays as it was executed."""
    notebook = project_root() / "notebooks" / f"{step}.ipynb"
    today = {cell.get("id"): cell["source"] for cell in read_cells(notebook)} if notebook.is_file() else {}
    for cell in cells:
        source = today.get(cell.get("id"), cell["source"])
        if source == cell["source"]:
            continue  # most are, and to parse them all takes time
        if cell["cell_type"] == "markdown" or without_comments(source) == without_comments(cell["source"]):
            cell["source"] = source


def made_from(notebook: Path, manifest: Path) -> dict[str, str]:
    """Return name -> sha256 of what a page is made from: a notebook, executed or not, with the text of today's, the
    step's manifest if there is one, and each file of results/ that code opens; {} without the notebook."""
    if not notebook.is_file():
        return {}
    cells = [cell for cell in read_cells(notebook) if "injected-parameters" not in cell["metadata"].get("tags", [])]
    take_prose(cells, notebook.stem)
    found = {notebook.name: sha256_text(json.dumps([(cell["cell_type"], cell["source"]) for cell in cells]))}
    if manifest.is_file():
        found[MANIFEST] = sha256_file(manifest)
    for code in (cell["source"] for cell in cells if cell["cell_type"] == "code"):
        for opened in OPENED.findall(code):
            name = "/".join(re.findall(r'"([^"]+)"', opened))
            if (project_root() / name).is_file():
                found[name] = sha256_file(project_root() / name)
    return found


def made_from_run(run: Path, step: str) -> dict[str, str]:
    """Return what a page of a run's executed notebook would be made from; {} where it has none. Of 00 and 07, outside
    the chain, no manifest is published, so none is noted."""
    manifest = run / step / MANIFEST if step in STEPS else Path()
    return made_from(run / "notebooks" / f"{step}.ipynb", manifest)


def old_pages() -> dict[Path, list[str]]:
    """Return page -> what it was made from and is another today, of all pages that are old."""
    found = {}
    for page in sorted((project_root() / "results" / "notebooks").glob("*/*.html")):
        today = made_from_today(page)
        noted = dict(NOTED.findall(page.read_text(encoding="utf-8")))
        if changed := sorted(name for name in noted | today if noted.get(name) != today.get(name)):
            found[page] = changed
    return found


def made_from_today(page: Path) -> dict[str, str]:
    """Return what a page has to be made from: today's notebook, and the published manifest of its run."""
    manifest = project_root() / "results" / page.parent.name / "manifests" / f"{page.stem}.json"
    return made_from(project_root() / "notebooks" / f"{page.stem}.ipynb", manifest)


def can_be_remade(page: Path) -> bool:
    """Say whether the executed notebook in results/runs has today's code and made what is published."""
    return made_from_run(run_folder(page.parent.name), page.stem) == made_from_today(page)
