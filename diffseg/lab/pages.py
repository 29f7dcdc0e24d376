"""A run's executed notebooks as small HTML pages: images and formulas inside, no script, nothing is fetched.

nbconvert's HTMLExporter makes them with a template of ours, `page.html.j2`, because its own templates load MathJax from
the network and are mostly style sheet. Formulas are drawn by matplotlib: MathML was tried, and what a browser makes of
it depends on the reader's fonts (brackets that do not grow, missing signs).
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

from diffseg.errors import DiffsegError
from diffseg.paths import project_root

FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\s](?:[^$\n]*[^$\s])?)\$|```.*?```|`[^`\n]+`", re.DOTALL)
# what matplotlib's mathtext does not know, and instead of it: brackets that fit what they enclose, other names, and
# nothing for a size; a sum gets room, as its limits would touch what stands before
INSTEAD = [
    (r"\\[bB]igg?[lr]?\s*(?=[(\[])", r"\\left"),
    (r"\\[bB]igg?[lr]?\s*(?=[)\]])", r"\\right"),
    (r"\\([lg])e(?![a-zA-Z])", r"\\\1eq"),
    (r"\\[lr]Vert(?![a-zA-Z])", r"\\|"),
    (r"\\displaystyle(?![a-zA-Z])", ""),
    (r"\\sum(?![a-zA-Z])", r"\\;\\sum"),
]
# in a notebook's JSON: a value of the parameter `out`, and what comes before runs/ or steps/ in a path
PLACE = re.compile(r"""(?<=out = \\")[^\\"]+|/[^\s"'<>\\]*/(?=(?:runs|steps)/)""")
LETTERS = FontProperties(size=11.5, math_fontfamily="stix")  # points: the page's 16 pixels, at 100 dots an inch


def page(executed: Path, pages: Sequence[str]) -> str:
    """Return an executed notebook, <run>/notebooks/<step>.ipynb, as one HTML page that links to the run's `pages`."""
    run, step = executed.parents[1], executed.stem
    try:
        text = executed.read_text(encoding="utf-8")
        # where it lay on the machine that ran it is of no use to a reader
        text = PLACE.sub("results/", text).replace(f"{project_root()}/", "")
        notebook = nbformat.reads(text, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        raise DiffsegError(
            f"the run {run.name} has no executed notebook of {step}; "
            f"run `diffseg run {run.name} --force` to execute its notebooks again."
        ) from None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
    exporter = HTMLExporter(
        template_name="basic",
        template_file="page.html.j2",
        extra_template_paths=[str(Path(__file__).parent)],
        filters={"webp": webp},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        config={"CSSHTMLHeaderPreprocessor": {"style": "default"}},
    )
    html, _ = exporter.from_notebook_node(notebook, {"run": run.name, "step": step, "pages": pages})
    return html


def webp(png: str) -> str:
    """Return a PNG as WebP, both in base64; lossless where that is the smaller one, as it is for bars and curves."""
    picture, coded = Image.open(io.BytesIO(base64.b64decode(png))), []
    for options in ({"lossless": True}, {"quality": 75}):
        file = io.BytesIO()
        picture.save(file, "WEBP", method=4, **options)
        coded.append(file.getvalue())
    return base64.b64encode(min(coded, key=len)).decode()


def with_formulas(markdown: str) -> str:
    """Return Markdown whose `$...$` and `$$...$$` are images that hold their TeX as text; code stays as it is.

    A formula that matplotlib's mathtext cannot read stays TeX.
    """

    def picture_of(match: re.Match) -> str:
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
        data = base64.b64encode(file.getvalue()).decode()
        image = f'<img alt="{alt}" style="{style}" src="data:image/png;base64,{data}">'
        return f'\n\n<div style="text-align:center">{image}</div>\n\n' if match["block"] else image

    return FORMULA.sub(picture_of, markdown)
