"""A run's executed notebooks as small HTML pages: images and formulas inside, no script, nothing is fetched.

nbconvert's HTMLExporter makes them with a template and a Markdown renderer of ours, because its own load MathJax from
the network and are mostly style sheet. Formulas are drawn by matplotlib: MathML was tried, and what a browser makes of
it depends on the reader's fonts (brackets that do not grow, missing signs).
"""

import ast
import base64
import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from diffseg.errors import DiffsegError
from diffseg.lab.old_pages import made_from_run, take_prose
from diffseg.paths import project_root

HERE = Path(__file__).parent

# what matplotlib's mathtext does not know, and instead of it: brackets that fit what they enclose, other names, and
# nothing for a size; a sum gets room, as its limits would touch what stands before
INSTEAD = [
    (r"\\[bB]igg?[lr]?\s*(?=[(\[])", r"\\left"),
    (r"\\[bB]igg?[lr]?\s*(?=[)\]])", r"\\right"),
    (r"\\([lg])e(?![a-zA-Z])", r"\\\1eq"),
    (r"\\[lr]Vert(?![a-zA-Z])", r"\\|"),
    (r"\\displaystyle(?![a-zA-Z])", ""),
    (r"\\sum(?![a-zA-Z])", r"\\;\\sum"),
    (r"\\setminus(?![a-zA-Z])", r"\\,\\backslash\\,"),
]
# in a notebook's JSON: a value of the parameter `out`, and what comes before runs/ or steps/ in a path; bounded, as
# every slash of a figure's base64 begins a search
PLACE = re.compile(r"""(?<=out = \\")[^\\"]+|/[^\s"'<>\\]{0,500}/(?=(?:runs|steps)/)""")
LETTERS = FontProperties(size=11.5, math_fontfamily="stix")  # points: the page's 16 pixels, at 100 dots an inch


def page(executed: Path, links: Mapping[str, str]) -> str:
    """Return an executed notebook, <run>/notebooks/<step>.ipynb, as one HTML page, with the text of today's notebook.

    links: name of a notebook of the course -> address of its page, in order; the page's own among them. Raises a
    DiffsegError when there is no executed notebook.
    """
    run, step = executed.parents[1], executed.stem
    notebook = read_executed(run, step)
    take_prose(notebook.cells, step)
    merge_parameters(notebook)
    renderer = Renderer()
    exporter = HTMLExporter(
        template_name="basic",
        template_file="page.html.j2",
        extra_template_paths=[str(HERE)],
        filters={
            "webp": webp,
            "markdown2html": MarkdownWithMath(renderer=renderer).render,
            "headings": lambda cells: renderer.headings,  # of what it has rendered
        },
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        config={"CSSHTMLHeaderPreprocessor": {"style": "default"}},
    )
    names = list(links)
    place = names.index(step)
    about = {"run": run.name, "step": step, "links": links, "made_from": made_from_run(run, step)}
    about |= {"before": names[place - 1] if place else "", "after": names[place + 1] if names[place + 1 :] else ""}
    html, _ = exporter.from_notebook_node(notebook, about)
    return html


def read_executed(run: Path, step: str) -> nbformat.NotebookNode:
    """Return a run's executed notebook, without the folders of the machine that ran it, of no use to a reader."""
    try:
        text = (run / "notebooks" / f"{step}.ipynb").read_text(encoding="utf-8")
        return nbformat.reads(PLACE.sub("results/", text).replace(f"{project_root()}/", ""), as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        raise DiffsegError(
            f"the run {run.name} has no executed notebook of {step}; "
            f"run `diffseg run {run.name} --force` to execute its notebooks again."
        ) from None


def index_page(runs: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page that lists the pages of all runs: run -> name of a notebook -> address."""
    return Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("index.html.j2").render(runs=runs)


def merge_parameters(notebook: nbformat.NotebookNode) -> None:
    """Write the values that papermill injected into the parameters' own cell, beside their comments; in place."""
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    if not {"parameters", "injected-parameters"} <= set(tagged):
        return
    cell, injected = tagged["parameters"], tagged["injected-parameters"]
    values = {node.targets[0].id: ast.unparse(node.value) for node in ast.parse(injected.source).body}
    lines = cell.source.split("\n")
    for node in ast.parse(cell.source).body:
        value, name = node.value, node.targets[0].id
        if name in values and ast.unparse(value) != values[name] and value.lineno == value.end_lineno:
            line = lines[value.lineno - 1].encode()  # columns count bytes
            new = line[: value.col_offset] + values[name].encode() + line[value.end_col_offset :]
            lines[value.lineno - 1] = new.decode()
    cell.source = "\n".join(lines)
    notebook.cells.remove(injected)


class Renderer(IPythonRenderer):
    """Markdown as HTML; formulas are images that hold their TeX as text, and headings are listed for the contents."""

    def __init__(self):
        path = str(project_root() / "notebooks")
        super().__init__(escape=False, embed_images=True, path=path, exclude_anchor_links=True)
        self.headings: list[str] = []  # of the second level, with the ids section-1, section-2, ...

    def heading(self, text: str, level: int, **attrs) -> str:
        if level == 2:
            self.headings.append(text)
            attrs["id"] = f"section-{len(self.headings)}"
        return super().heading(text, level, **attrs)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        here = re.match(r"[a-z]+:|#", url) or url.endswith(".html")
        return super().link(text, url if here else f"../../../notebooks/{url}", title)  # a page lies three folders down

    def inline_math(self, body: str) -> str:
        return formula(body) or super().inline_math(body)

    def block_math(self, body: str) -> str:
        image = formula(body, True)
        return f'<span class="formula">{image}</span>' if image else super().block_math(body)


def webp(png: str) -> str:
    """Return a PNG as WebP, both in base64; lossless where that is the smaller one, as it is for bars and curves."""
    picture, coded = Image.open(io.BytesIO(base64.b64decode(png))), []
    for options in ({"lossless": True}, {"quality": 75}):
        file = io.BytesIO()
        picture.save(file, "WEBP", method=4, **options)
        coded.append(file.getvalue())
    return base64.b64encode(min(coded, key=len)).decode()


def formula(tex: str, block: bool = False) -> str:
    """Return a formula as an <img>, or "" where matplotlib's mathtext cannot read it."""
    file, words = io.BytesIO(), " ".join(tex.split())
    block = block or r"\displaystyle" in words
    for pattern, instead in INSTEAD:
        words = re.sub(pattern, instead, words)
    words = words.replace(r"\frac", r"\dfrac") if block else words
    try:
        depth = math_to_image(f"${words}$", file, prop=LETTERS, dpi=200, format="png")  # in points
    except ValueError:
        return ""
    width, height = (side / 2 for side in Image.open(file).size)  # sharp on dense screens too, as tall as the text
    style = f"width:{width:.1f}px;aspect-ratio:{width:.1f}/{height:.1f};vertical-align:-{depth * 100 / 72:.1f}px"
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(tex.strip())}" style="{style}" src="data:image/png;base64,{data}">'
