"""Strip notebooks to what is committed: python notebooks/strip.py notebooks/*.ipynb notebooks/solutions/*.ipynb

Outputs, execution counts and what papermill and JupyterLab add are removed; sources, tags and cell ids stay. Cells
tagged `solution` are folded.
"""

import json
import sys
from pathlib import Path

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def strip(notebook: dict) -> dict:
    """Return a notebook (nbformat 4, as JSON gives it) with sources, ids and tags only."""
    cells = []
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags or "papermill-error-cell-tag" in tags:
            continue
        kept = {**cell, "metadata": {"tags": tags} if tags else {}}
        if "solution" in tags:
            kept["metadata"]["jupyter"] = {"source_hidden": True}
        cells.append(kept | {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else kept)
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        stripped = strip(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(stripped, indent=1, ensure_ascii=False, sort_keys=True) + "\n"  # as JupyterLab saves
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"stripped {path}")
