"""A run's executed notebooks as small HTML pages: pictures and formulas inside, no script, nothing is fetched.

nbconvert (it comes with JupyterLab) turns each cell into HTML; the page around it, the formulas and the size of the
pictures are ours, because nbconvert's own pages load MathJax from the network and are mostly style sheet.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import nbformat
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from PIL import Image
from pygments.formatters import HtmlFormatter

from diffseg.errors import DiffsegError

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
pre { font: 13px/1.4 ui-monospace, monospace; overflow-x: auto; margin: 0; }
code { font: 0.9em ui-monospace, monospace; background: #f3f3f3; }
pre code { font-size: inherit; background: none; }
.input { border-left: 3px solid #0072b2; background: #f7f7f7; padding: 0.5rem 0.8rem; margin: 1rem 0 0.3rem; }
.output { margin: 0.3rem 0 1.2rem; overflow-x: auto; }
.output img { max-width: 100%; }
.output pre { white-space: pre-wrap; }
.prompt { display: none; }
.anchor-link { display: none; }
table { border: 0; border-collapse: collapse; font-size: 13px; margin: 0.5rem 0; }
th, td, table.dataframe thead th { padding: 0.2rem 0.6rem; text-align: left; border: 0; border-bottom: 1px solid #ddd; }
nav { font-size: 14px; } nav b, nav a { margin-right: 0.8em; }
"""
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\s](?:[^$\n]*[^$\s])?)\$|```.*?```|`[^`\n]+`", re.DOTALL)
# what matplotlib's mathtext does not know, and instead of it: brackets that fit what they enclose, other names, and
# nothing for a size; a sum gets room, as its limits would touch what stands before
INSTEAD = [
    (r"\\[bB]igg?[lr]?\s*(?=[(\[])", r"\\left"),
    (r"\\[bB]igg?[lr]?\s*(?=[)\]])", r"\\right"),
    (r"\\([lg])e(?![a-zA-Z])", r"\\\1eq"),
    (r"\\[lr]Vert(?![a-zA-Z])", r"\\|"),
    (r"\\(displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    (r"\\sum(?![a-zA-Z])", r"\\;\\sum"),
]
LETTERS = FontProperties(size=11.5, math_fontfamily="stix")  # points: the page's 16 pixels, at 100 dots an inch


def embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def smaller(png: bytes) -> bytes:
    """Return a picture as WebP, lossless where that is the smaller one, as it is for bars and curves."""
    picture = Image.open(io.BytesIO(png))
    coded = []
    for options in ({"lossless": True}, {"quality": 75}):
        file = io.BytesIO()
        picture.save(file, "WEBP", method=4, **options)
        coded.append(file.getvalue())
    return min(coded, key=len)


def with_formulas(markdown: str) -> str:
    """Return Markdown whose `$...$` and `$$...$$` are pictures that hold their TeX as text; code stays as it is.

    Drawn by matplotlib's mathtext; a formula that it cannot read stays TeX.
    """

    def draw(match: re.Match) -> str:
        tex = match["block"] or match["inline"]
        if tex is None:  # code
            return match[0]
        file, words = io.BytesIO(), " ".join(tex.split())
        for pattern, instead in INSTEAD:
            words = re.sub(pattern, instead, words)
        words = words.replace(r"\frac", r"\dfrac") if match["block"] else words
        try:
            depth = math_to_image(f"${words}$", file, prop=LETTERS, dpi=200, format="png")  # in points
        except ValueError:
            return match[0]
        width, height = (side / 2 for side in Image.open(file).size)  # sharp on dense screens too, as tall as the text
        style = f"width:{width:.1f}px;height:{height:.1f}px;vertical-align:-{depth * 100 / 72:.1f}px"
        alt = escape(tex).replace("|", "&#124;")  # a bar would end the cell of a table
        image = f'<img alt="{alt}" style="{style}" src="{embedded(file.getvalue(), "png")}">'
        return f'\n\n<div style="text-align:center">{image}</div>\n\n' if match["block"] else image

    return FORMULA.sub(draw, markdown)


def tidy(notebook: nbformat.NotebookNode, run: str) -> None:
    """Drop progress bars and places on this machine from an executed notebook, and make its pictures small."""
    # this run's folder wherever it lay, and that of another run of the same root, whose step it shares
    place = re.compile(rf"/[^\s'\"<>]*/(?:(?={re.escape(run)}(?:[/'\"\s]|$))|results/runs/)")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
            continue
        cell.source = re.sub(r"(?m)^out = ['\"].*['\"]$", 'out = ""', cell.source)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = place.sub("results/runs/", output.text)
                continue
            data = output.get("data", {})
            for kind in data.keys() & {"text/plain", "text/html", "text/markdown"}:
                data[kind] = place.sub("results/runs/", data[kind])
            if "image/png" in data:
                coded = smaller(base64.b64decode(data["image/png"]))
                output["data"] = {"text/html": f'<img alt="figure" src="{embedded(coded, "webp")}">'}


def sections(notebook: nbformat.NotebookNode) -> dict[str, list[tuple[str, str]]]:
    """Return the id of each Markdown cell -> (id, source) of the code up to the next, parameters apart."""
    found: dict[str, list[tuple[str, str]]] = {}
    code: list[tuple[str, str]] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found[cell.id] = code = []
        elif not {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            code.append((cell.id, cell.source))
    return found


def take_prose(notebook: nbformat.NotebookNode, today: nbformat.NotebookNode) -> None:
    """Put today's Markdown into an executed notebook, where the cells and the code below are the same.

    Text may be mended, and its numbers measured again, after a run; the outputs stay those of the run.
    """
    before, now = sections(notebook), sections(today)
    if list(before) != list(now):
        return
    words = {cell.id: cell.source for cell in today.cells if cell.cell_type == "markdown"}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and before[cell.id] == now[cell.id]:
            cell.source = words[cell.id]


def page(executed: Path, run: str, pages: Sequence[str] = (), today: Path | None = None) -> str:
    """Return an executed notebook as one HTML page.

    `run` is the name of its run, `pages` the names of all pages of the run (a line of links on top), `today` the
    notebook as it is now, whose text is taken (`take_prose`). The page holds all it needs. Raises a DiffsegError for
    a file that is no notebook.
    """
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise DiffsegError(f"{executed} is no executed notebook ({error}); run its step again.") from error
    if today is not None:
        take_prose(notebook, nbformat.read(today, as_version=4))
    tidy(notebook, run)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    name = executed.parent.name
    links = " ".join(f"<b>{other}</b>" if other == name else f'<a href="{other}.html">{other}</a>' for other in pages)
    style = STYLE + HtmlFormatter(style="default").get_style_defs(".highlight")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)} ({escape(run)})</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body><nav>{links}</nav>\n{body}\n</body></html>\n"
    )
