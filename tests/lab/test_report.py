"""What a run's report says: its own numbers, those of others beside them, the list of claims, and the HTML pages."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from PIL import Image
from PIL.ImageColor import getrgb

from diffseg.benchmarks.classes import VOC
from diffseg.charts import class_scores, half_interval
from diffseg.errors import DiffsegError
from diffseg.experiments.generator.measure import quality_tables
from diffseg.experiments.generator.versions import version_rows
from diffseg.figures import (
    CLASS_COLOURS,
    COLOURS,
    ERRORS,
    IGNORED,
    WIDTH,
    Tile,
    error_masks,
    error_tile,
    first_of_each,
    story,
)
from diffseg.files import read_rows, write_text
from diffseg.lab import runs
from diffseg.lab.cli import main
from diffseg.lab.manifests import write_manifest
from diffseg.lab.old_pages import old_pages
from diffseg.lab.pages import Renderer, formula, page
from diffseg.lab.publishing import benchmarks_table, claim_with_numbers, copy_results, readme_with_tables, write_pages
from diffseg.lab.quoted import with_cells
from diffseg.lab.report import (
    OURS,
    ROBUST,
    beside_published,
    caption,
    published_numbers,
    reproduction,
    reproduction_text,
    summarise,
    table_text,
)
from diffseg.lab.steps import STEPS, notebook_of
from diffseg.paths import project_root

RESULTS = project_root() / "results"


def manifests(groups: bool = False, real: bool = True) -> dict:
    """The parts of five manifests that a summary needs; scores that can be read in the table at once."""

    def scores(miou: float) -> dict:
        merged = {"group/Human": miou + 0.1, "group/Vehicle": None} if groups else {}
        bounds = {"miou_low": miou - 0.02, "miou_high": miou + 0.03}
        pixels = {"images": 150, "iou/person": miou, "iou/car": miou}
        return {
            "benchmark": "cityscapes-things",
            "inference": "single scale",
            "miou": miou,
            **bounds,
            **pixels,
            **merged,
        }

    evaluation = {"synthetic": scores(0.3)} | ({"real": scores(0.6)} if real else {})
    machine = {"gpus": [], "cores": 2, "cpu": "a CPU"}
    made = {step: {"metrics": {}, "parameters": {}, "seconds": 60.0} for step in STEPS if step != "06_report"}
    made["03_synthesis"] |= {"hardware": machine, "metrics": {"images": 720}, "parameters": {"generator": "mini"}}
    made["04_robust_training"]["metrics"] = {"images": 720, "images_real": 700 if real else None}
    made["04_robust_training"]["parameters"] = {"segmenter": "unet", "seed": 3}
    made["05_evaluation"]["metrics"] = evaluation
    return made


def read_csv(name: str) -> list[dict[str, str]]:
    return read_rows(RESULTS / name)


# the run's own numbers


def cells_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_merged_classes_stand_in_summary_and_table_where_a_benchmark_has_them():
    summary = summarise(manifests(groups=True))
    assert summary["groups"]["synthetic"] == {"Human": 0.4, "Vehicle": None}
    assert summary["groups"]["real"]["Human"] == pytest.approx(0.7)
    lines = [re.split(r"\s{2,}", line.strip()) for line in table_text(summary).splitlines()]
    assert lines[1][-2:] == ["Human (%)", "Vehicle (%)"]
    assert lines[3] == ["synthetic images, attention masks", "720", "30.0", "28.0 to 33.0", "40.0", "-"]
    assert lines[5] == ["ratio", "0.50"]


def test_without_merged_classes_or_a_real_network_neither_is_mentioned():
    summary = summarise(manifests(real=False))
    assert "groups" not in summary and summary["ratio"] is None and summary["miou_real"] is None
    assert len(table_text(summary).splitlines()) == 4 and "real" not in table_text(summary)
    assert "real" not in caption(summary)
    for part in ("720 synthetic", "seed 3", "150 cityscapes-things validation", "2 cores of a CPU"):
        assert part in caption(summary)


def test_real_images_in_a_mixed_set_and_images_without_a_mask_are_told():
    made = manifests()
    made["03_synthesis"]["metrics"]["failed"] = 7
    made["04_robust_training"]["metrics"]["images"] = 713 + 700
    made["04_robust_training"]["parameters"]["mix_real"] = True
    summary = summarise(made)
    assert (summary["images"], summary["images_mixed"]) == (713, 700)
    assert "synthetic images, attention masks, and 700 real images, ground-truth masks  713" in table_text(summary)
    assert "trained on 713 synthetic and 700 real or 700 real images" in caption(summary)


def test_a_score_on_the_development_split_is_not_called_one_on_validation():
    made = manifests()
    assert summarise(made)["split"] == "validation"
    made["05_evaluation"]["parameters"]["evaluation_split"] = "dev"
    summary = summarise(made)
    assert summary["split"] == "dev" and "150 dev images" in table_text(summary)


# the numbers of others


def test_the_published_numbers_are_well_formed_and_no_others_than_we_know():
    rows = read_csv("published.csv")
    columns = "method benchmark segmenter training_images miou miou_real source sure differs".split()
    for row in rows:
        assert list(row) == columns and all(row[name] for name in ("method", "benchmark", "source", "sure", "differs"))
        assert row["sure"] in ("read", "second-hand") and re.search(
            r"\(\w+ 20\d\d\), arXiv \d{4}\.\d{5}$", row["source"]
        )
        assert row["miou"] or "not known to us" in row["differs"]
        assert row["training_images"] or not row["miou"] or row["benchmark"].startswith("masks")
    known = {(row["miou"], row["miou_real"], row["training_images"]) for row in rows if row["benchmark"] == "VOC"}
    paper = {("41.2", "", "2000"), ("51.1", "", "168679"), ("58.3", "", "168679")}
    peers = {("57.4", "77.3", "60000"), ("61.6", "77.4", "40000"), ("64.8", "79.9", "40000")}
    assert known == paper | peers
    assert {row["miou"] for row in rows if row["benchmark"] != "VOC"} == {"", "67", "70.4", "66.2", "80.3"}


def test_notebook_06_shows_ours_above_theirs():
    cells = nbformat.read(project_root() / "notebooks" / "06_report.ipynb", 4).cells
    [shown] = [cell.source for cell in cells if cell.id == "published"]
    assert "beside_published(summary, published_numbers(bench.protocol))" in shown
    voc = published_numbers("voc")
    assert list(voc.miou) == [41.2, 51.1, 58.3, 57.4, 61.6, 64.8] and "benchmark" not in voc
    for protocol in ("imagenet-s", "cityscapes"):
        [value] = published_numbers(protocol).miou
        assert np.isnan(value)
    beside = beside_published(summarise(manifests()), voc)
    assert list(beside.columns) == list(voc.columns) and len(beside) == 7
    assert list(beside.iloc[0][["segmenter", "training_images", "miou", "miou_real"]]) == ["unet", 720, 30.0, 60.0]
    assert beside.iloc[3].miou == 58.3 and beside.training_images.dtype == pd.Int64Dtype()
    alone = beside_published(summarise(manifests(real=False)), voc)
    assert pd.isna(alone.miou_real[0])


# the pictures


def test_the_first_picture_of_each_class_is_the_one_that_shows_most_of_it():
    labels = [[0, 0, 0, 0], [2, 1, 1, 255], [7, 7, 7, 2], [1, 2, 2, 2], [2, 2, 2, 2]]
    pictures = [(str(k), None, np.array([label])) for k, label in enumerate(labels)]
    assert first_of_each(pictures, [1, 2]) == {1: 1, 2: 2}  # of 1 and 2 only: 7 is not asked for
    assert first_of_each(pictures, [1, 2, 3]) == {1: 1, 2: 2} and first_of_each(pictures[:1], [1]) == {}


def test_a_story_draws_every_picture_in_its_shape_and_its_text_inside_the_figure():
    picture, label = np.zeros((10, 20, 3), np.uint8), np.array([[0] * 10 + [2] * 9 + [255]] * 10)
    rows = {
        "drawn": [picture, Tile(picture, label), picture],
        "mask from\nattention": [Tile(label=label), None, picture],
    }
    parts = [("words " * 40, ["a", "b", "long words " * 5], rows), ("result", [], {})]
    figure = story(parts, ("background", "cat", "dog"), {"missed": "#F0E442"})
    assert len(figure.axes) == 5 and figure.get_size_inches()[0] <= WIDTH
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert all(box.width / box.height == pytest.approx(2) for box in boxes)
    for text in [*figure.texts, *figure.legends]:
        extent = text.get_window_extent()
        assert not any(extent.overlaps(box) for box in boxes), text
        for (low, high), limit in zip(extent.get_points().T, figure.bbox.size, strict=True):
            assert -1 <= low and high <= limit + 1, text
    # the background needs no legend, and the cat is not there
    names = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert names == [["dog", "ignored"], ["missed"]]
    painted = figure.axes[3].images[0].get_array()  # the first of the second row
    assert [tuple(painted[0, k]) for k in (0, 12, 19)] == [(0, 0, 0), getrgb(CLASS_COLOURS[0]), getrgb(IGNORED)]
    plt.close(figure)


def test_errors_of_an_image_by_hand():
    label, found = np.array([[0, 1, 1, 2, 255]]), np.array([[1, 1, 0, 1, 1]])
    kinds = error_masks(label, found, VOC)
    assert {kind: np.flatnonzero(where).tolist() for kind, where in kinds.items()} == {
        "correct": [1],
        "missed": [2],
        "false object": [0],
        "wrong class": [3],
    }
    tile = error_tile(np.full((1, 5, 3), 100, np.uint8), label, found, VOC)
    assert tile.note == "25 %" and [tuple(colour) for colour in tile.image[0]] == [
        *(getrgb(ERRORS[kind]) for kind in ("false object", "correct", "missed", "wrong class")),
        (35, 35, 35),
    ]
    nothing = np.zeros((1, 5), int)
    assert error_tile(np.zeros((1, 5, 3), np.uint8), nothing, nothing, VOC).note == ""


def cielab(colours: list[str], sight: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of "#RRGGBB" as seen through a matrix on linear RGB."""
    values = np.array([getrgb(colour) for colour in colours]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = (linear @ sight.T).clip(0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


# Machado, Oliveira and Fernandes (2009), severity 1.0
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)


@pytest.mark.parametrize(
    "colours, least",
    [(CLASS_COLOURS[:12], 20), (CLASS_COLOURS, 15), ([*ERRORS.values()], 30), (COLOURS, 18)],
    ids=["twelve classes", "twenty classes", "errors", "lines"],
)
def test_colours_differ_for_normal_sight_and_for_deuteranopes(colours, least):
    for sight in (np.eye(3), DEUTERANOPIA):
        seen = cielab(colours, sight)
        distances = np.linalg.norm(seen[:, None] - seen, axis=2) + 1e3 * np.eye(len(colours))
        assert distances.min() >= least


def test_the_interval_of_a_mean_is_students():
    assert half_interval([50, 51, 52]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)  # t of 2 degrees of freedom
    assert np.isnan(half_interval([50]))


def test_an_interval_that_lies_beside_its_mean_is_drawn_where_it_lies():
    figure = class_scores({"synthetic": {"dog": 0.8, "cat": None}}, {"synthetic": (0.73, 0.4, 0.55)})
    spans = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(span, [40, 55]) for span in spans)


# the claims


@pytest.mark.parametrize("claim", read_csv("claims.csv"), ids=lambda row: row["claim"][:40])
def test_a_claim_with_a_verdict_names_the_cells_of_its_numbers(claim):
    for verdict, file in (("mini", "mini_file"), ("paper_scale", "paper_scale_file")):
        assert claim[verdict] in ("shown", "not shown", "measured", "not run")
        if claim[verdict] != "not run":
            assert (RESULTS / claim[file]).is_file(), claim[file] or "a verdict needs a file"
    assert (claim["mini"] in ("shown", "not shown")) == bool(claim["decided_by"]), "an interval decides"
    assert claim_with_numbers(claim, RESULTS) == claim, "run diffseg publish"


def test_a_verdict_follows_from_the_interval(tmp_path):
    claim = dict.fromkeys(("paper", "paper_cells", "mini_finding", "mini_file", "mini_cells", "mini"), "")
    claim["decided_by"] = "a.csv; gain_low"
    for low, verdict in ((0.2, "shown"), (0.0, "not shown"), (-3.0, "not shown"), ("nan", "not shown")):
        (tmp_path / "a.csv").write_text(f"gain,gain_low\n5,{low}\n")
        assert claim_with_numbers(claim, tmp_path)["mini"] == verdict


def test_a_number_below_zero_is_filled_in_with_its_sign(tmp_path):
    (tmp_path / "a.csv").write_text("gain,low\n0.25,-0.5\n")
    text = with_cells("gains 0.2 (0.1 to 0.7-0.9)", tmp_path, "a.csv", "gain | low | gain | low")
    assert text == "gains 0.2 (-0.5 to 0.2--0.5)"
    assert with_cells("a loss of -0.1", tmp_path, "a.csv", "low") == "a loss of -0.5"
    assert with_cells("a loss of -0.5", tmp_path, "a.csv", "gain") == "a loss of 0.2"


def test_a_wrong_number_planted_in_a_claim_is_found():
    decimals = [
        (claim, column, match)
        for claim in read_csv("claims.csv")
        for column in ("paper", "mini_finding")
        for match in re.finditer(r"\d+\.\d+", claim[column])
    ]
    assert len(decimals) > 40
    for claim, column, match in decimals:
        text, last = claim[column], match.end() - 1
        planted = f"{text[:last]}{(int(text[last]) + 1) % 10}{text[last + 1 :]}"
        assert claim_with_numbers(claim | {column: planted}, RESULTS) == claim
    with pytest.raises(DiffsegError, match="has 2 decimals and 1 cells of tables/a.csv"):
        with_cells("from 1.0 to 2.0", RESULTS, "tables/a.csv", "miou")


# the README's tables


def test_one_row_a_benchmark_from_the_summaries_of_all_runs(tmp_path):
    for name, made in (("mini-a", manifests(groups=True)), ("mini-b", manifests(real=False))):
        (tmp_path / "results" / name / "manifests").mkdir(parents=True)
        (tmp_path / "results" / name / "summary.json").write_text(json.dumps(summarise(made)))
        evaluation = tmp_path / "results" / name / "manifests" / "05_evaluation.json"
        more = {"resumed": name == "mini-b"}  # its minutes are of the last attempt
        evaluation.write_text(json.dumps(made["05_evaluation"] | more))
    ladder = f'benchmark,split,rung,miou,miou_spread,seeds\nmini-a,validation,"{ROBUST}",28.5,1.2,5\n'
    write_text(tmp_path / "results" / "tables" / "ladder.csv", ladder)
    table = benchmarks_table(sorted(tmp_path.glob("results/*/summary.json")))
    write_text(tmp_path / "results" / "tables" / "a.md", table)
    filled = readme_with_tables("a\n<!-- table: results/tables/a.md -->\nold\n<!-- /table -->\nb\n", tmp_path)
    lines, cells = filled.splitlines(), cells_of(filled)
    both = ["cityscapes-things", "2", "720", "30.0 (28.0 to 33.0)"]
    assert cells[4] == ["mini-a", *both, "28.5 ± 1.2 (5)", "60.0 (58.0 to 63.0)", "0.50", "6.0"]
    assert cells[5] == ["mini-b", *both, "-", "-", "-", "-"]
    assert lines[0] == "a" and lines[-1] == "b" and "old" not in lines
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    assert readme_with_tables(filled, tmp_path) == filled


def test_a_generator_that_went_on_from_another_tells_of_all_its_training():
    report = json.loads((RESULTS / "mini_generator.json").read_text())
    training, before = report["training"], report["training"]["initial"]
    told = quality_tables(report)
    assert f"Training: {training['samples_seen'] + before['samples_seen']:,} samples" in told
    assert f"{(training['seconds'] + before['seconds']) / 3600:.1f} hours" in told


def test_two_generators_are_compared_on_the_same_pictures_only():
    report = json.loads((RESULTS / "mini_generator.json").read_text())
    better = report | {"both_present": 1.0, "per_class": report["per_class"] | {"cat": report["per_class"]["dog"]}}
    gains = {(row["of"], row["measure"]): row["gain"] for row in version_rows(report, better)}
    assert gains["all", "both_present"] == round(1 - round(report["both_present"], 4), 4) > 0
    assert gains["all", "mask_iou"] == gains["dog", "mask_iou"] == 0 != gains["cat", "mask_iou"]
    assert {of for of, _ in gains} == {"all", *report["per_class"]}
    with pytest.raises(DiffsegError, match="differ in pairs"):
        version_rows(report, report | {"pairs": 1})


# the pages


def png(figure: bool) -> str:
    """A figure of a few lines, or a photograph's noise, as an executed notebook holds it."""
    file = io.BytesIO()
    if figure:
        drawing, axis = plt.subplots(figsize=(2, 2))
        axis.plot([0, 1])
        drawing.savefig(file, format="png")
        plt.close(drawing)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
        Image.fromarray(noise).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_executed(path: Path) -> None:
    """A notebook by hand with all that must be tidied: progress bars, foreign folders, large pictures, formulas."""
    output = nbformat.v4.new_output
    given = nbformat.v4.new_code_cell('out = ""  # folder\nseed = 0  # π', metadata={"tags": ["parameters"]})
    injected = nbformat.v4.new_code_cell(
        '# Parameters\nout = "/far/away"\nseed = -3', metadata={"tags": ["injected-parameters"]}
    )
    begin = nbformat.v4.new_code_cell("step.folder")
    begin.outputs = [
        output("execute_result", {"text/plain": "PosixPath('/far/away/runs/tiny/05_evaluation')"}),
        output(
            "stream",
            name="stdout",
            text="wrote /far/away/runs/tiny and /far/away/results/runs/other/03 and 3 < 4\n",
        ),
        output("stream", name="stderr", text="\r 20%|##   | 1/5\r100%|#####| 5/5"),
    ]
    draw = nbformat.v4.new_code_cell("plot()")
    draw.outputs = [
        output("display_data", {"image/png": png(figure), "text/plain": "<Figure>"}) for figure in (True, False)
    ]
    text = nbformat.v4.new_markdown_cell(
        "# Title\n\n## The *score* of $y$\n\nIoU of $x_i$ for `$HOME`.\n\n$$\\mathrm{IoU} = \\frac{a}{b}$$\n\n"
        "| a | b |\n|---|---|\n| $\\frac{1}{2}$ | c |\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[text, given, injected, begin, draw]), path)


def test_a_page_needs_no_other_file_and_names_no_foreign_folder(tmp_path):
    executed = tmp_path / "runs" / "tiny" / "notebooks" / "05_evaluation.ipynb"
    write_executed(executed)
    html = page(executed, {"04_robust_training": "04_robust_training.html", "05_evaluation": "05_evaluation.html"})
    assert html.startswith("<!DOCTYPE html>") and "<h1" in html and "05_evaluation (tiny)" in html
    assert "far/away" not in html and "results/runs/tiny/05_evaluation" in html and "3 &lt; 4" in html
    assert "wrote results/runs/tiny and results/runs/other/03" in html
    assert "5/5" not in html and "<script" not in html and not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert '<a href="04_robust_training.html">' in html and "<b>05_evaluation</b>" in html
    assert "← 04_robust_training" in html and "next:" not in html and 'href="../index.html"' in html
    assert '<a href="#section-1">The <em>score</em> of <img' in html and '<h2 id="section-1">' in html
    # each parameter once, with its value and its comment
    code = re.sub("<[^>]+>", "", html)
    assert code.count("seed = -3  # π") == 1 and "seed = 0" not in code and "# Parameters" not in code
    images = [base64.b64decode(data) for data in re.findall(r"data:image/webp;base64,([^\"]+)", html)]
    assert [Image.open(io.BytesIO(data)).size for data in images] == [(200, 200), (200, 200)]
    for coded, figure in zip(images, (True, False), strict=True):
        assert len(coded) < 0.6 * len(base64.b64decode(png(figure)))
    formulas = re.findall(r'<img alt="([^"]+)" src="data:image/png', html)
    assert formulas == ["y", "y", "x_i", r"\mathrm{IoU} = \frac{a}{b}", r"\frac{1}{2}"]
    assert "<code>$HOME</code>" in html


def test_a_formula_that_cannot_be_drawn_stays_tex():
    tex = r"\begin{cases}a\end{cases}"
    assert formula(tex) == "" and Renderer().inline_math(tex) == f"${tex}$"


def test_every_formula_of_the_notebooks_can_be_drawn_but_those_with_a_brace_below():
    for path in sorted((project_root() / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                html = MarkdownWithMath(renderer=Renderer()).render(cell.source)
                rest = re.sub(r"<img [^>]*>|<pre>.*?</pre>|<code>.*?</code>", "", html, flags=re.DOTALL)
                left = [tex for tex in re.findall(r"\$+[^$]+\$+", rest) if r"\underbrace" not in tex]
                assert not left, f"{path.name}, cell {cell.id}: write it in the words of matplotlib's mathtext"


def test_publish_writes_a_page_for_each_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    (tmp_path / "README.md").write_text("nothing to fill\n")
    (tmp_path / "notebooks").mkdir()
    run = tmp_path / "results" / "runs" / "tiny"
    notebooks = [notebook_of(step) for step in STEPS if step != "03_drawing"]
    for step in STEPS:
        (run / step).mkdir(parents=True)
        for name in ("summary.json", "table.txt", "figures.txt"):
            (run / step / name).write_text(json.dumps(summarise(manifests())))
        names = ["summary.json", "table.txt", "figures.txt"]
        made = {"step": step, "key": "k", "parameters": {}, "versions": {"diffseg": "0.0.1"}}
        made["recipe"] = {"parameters": {"beta": 0.4}} if step == "03_synthesis" else {}
        write_manifest(run / step, names, made | manifests().get(step, {}))
    for path in notebooks:
        write_executed(path)
        write_executed(run / "notebooks" / path.name)
    write_text(run / "figures" / "06_overview.png", "a figure")
    (run / "notebooks" / "04_robust_training.ipynb").unlink()
    assert main(["publish", str(run)]) == 1
    sentence = "the run tiny has no executed notebook of 04_robust_training; run `diffseg run tiny --force`"
    assert sentence in capsys.readouterr().err and not (tmp_path / "results" / "tiny").exists()
    write_executed(run / "notebooks" / "04_robust_training.ipynb")
    executed = run / "notebooks" / "03_synthesis.ipynb"
    content = json.loads(executed.read_text(encoding="utf-8"))
    content["metadata"]["papermill"] = {"parameters": {"beta": 0.2, "workers": 1}}
    write_text(executed, json.dumps(content))
    assert main(["publish", str(run)]) == 1
    sentence = "its notebook 03_synthesis was executed with another beta than its present step"
    assert sentence in capsys.readouterr().err and not (tmp_path / "results" / "tiny").exists()
    write_executed(executed)
    monkeypatch.chdir(run)
    assert main(["publish", "."]) == 0
    pages = sorted((tmp_path / "results" / "notebooks" / "tiny").iterdir())
    assert [path.name for path in pages] == [f"{path.stem}.html" for path in notebooks]
    assert '<a href="tiny/05_evaluation.html">' in (tmp_path / "results" / "notebooks" / "index.html").read_text()
    assert all(path.stat().st_size < 600e3 for path in pages)
    target = tmp_path / "results" / "tiny"
    assert sorted(path.stem for path in (target / "manifests").iterdir()) == sorted(STEPS)
    assert {path.name for path in target.iterdir()} == {"figures", "manifests", *names}
    assert [path.name for path in (target / "figures").iterdir()] == ["06_overview.png"]
    assert "| tiny " in (tmp_path / "results" / "tables" / "benchmarks.md").read_text()


def test_a_run_whose_steps_do_not_belong_together_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    run = tmp_path / "results" / "runs" / "tiny"
    for step, before in STEPS.items():
        folder = tmp_path / "results" / "steps" / step / "k"
        write_text(folder / "one.txt", "x")
        upstream = {name: "old" if step == "05_evaluation" else "k" for name in before}
        content = {"step": step, "key": "k", "parameters": {}, "recipe": {"upstream": upstream}}
        write_manifest(folder, ["one.txt"], content)
        runs.link(run / step, folder)
    with pytest.raises(DiffsegError, match="cannot be published: 05_evaluation in .* another 04_robust_training"):
        copy_results(run)
    assert not (tmp_path / "results" / "tiny").exists()


def test_no_published_page_is_older_than_its_notebook_or_its_data():
    old = {f"{page.parent.name}/{page.name}": changed for page, changed in old_pages().items()}
    assert not old, "run `diffseg publish`; where that is not enough it says what to run"


def test_a_page_outside_the_chain_is_not_older_than_its_run_for_want_of_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    run = tmp_path / "results" / "runs" / "mini-world"
    write_executed(tmp_path / "notebooks" / "00_mini_world.ipynb")
    write_executed(run / "notebooks" / "00_mini_world.ipynb")
    (run / "00_mini_world").mkdir()
    write_manifest(run / "00_mini_world", [], {"step": "00_mini_world", "key": "k", "parameters": {}})
    assert main(["publish", str(run)]) == 0
    assert (tmp_path / "results" / "notebooks" / "mini-world" / "00_mini_world.html").is_file() and old_pages() == {}


def test_a_page_that_is_older_than_its_notebook_or_its_data_is_found_and_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    write_text(tmp_path / "results" / "tables" / "a.csv", "name,miou\nours,71.04\n")
    text = nbformat.v4.new_markdown_cell("# Scores\n\nIt reaches 71.0<!-- tables/a.csv; name=ours; miou -->.")
    code = nbformat.v4.new_code_cell('seed = 0\nread(project_root() / "results" / "tables" / "a.csv")')
    notebook, run = tmp_path / "notebooks" / "05_evaluation.ipynb", tmp_path / "results" / "runs" / "tiny"

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[text, code]), path)

    def check(*changed: str) -> None:
        """Of the page `changed` is newer, and the command says so."""
        assert [*old_pages().values()] == ([[*changed]] if changed else [])
        assert main(["publish", "--check"]) == (1 if changed else 0)
        assert all(name in capsys.readouterr().out for name in changed)

    write(notebook)
    write(run / "notebooks" / notebook.name)
    write_text(run / "05_evaluation" / "manifest.json", "{}")
    write_text(tmp_path / "results" / "tiny" / "manifests" / "05_evaluation.json", "{}")
    write_pages(run, ["05_evaluation"])
    page = tmp_path / "results" / "notebooks" / "tiny" / "05_evaluation.html"
    check()
    write_text(tmp_path / "results" / "tables" / "a.csv", "name,miou\nours,72.96\n")
    check("results/tables/a.csv")
    assert main(["publish"]) == 0  # writes the number into the notebook, and from there into the page
    assert "It reaches 73.0<!--" in page.read_text()
    check()
    text.source = "# Scores of all classes"
    write(notebook)
    check("05_evaluation.ipynb")
    assert main(["publish"]) == 0 and "Scores of all classes" in page.read_text()
    check()
    write_text(tmp_path / "results" / "tiny" / "manifests" / "05_evaluation.json", '{"key": "another run"}')
    check("manifest.json")
    assert main(["publish"]) == 0
    check("manifest.json")  # the run here is not the published one
    write_text(tmp_path / "results" / "tiny" / "manifests" / "05_evaluation.json", "{}")
    code.source = code.source.replace("0", "1")
    write(notebook)
    assert main(["publish"]) == 0
    check("05_evaluation.ipynb")  # its code has to be executed first


def test_a_run_says_whether_it_reproduces_the_published_one(tmp_path, monkeypatch):
    """Seeds 0.50, 0.52 and 0.54: deviation 0.02, tolerance 4.303 sqrt(2) 0.02. Inert parameters may differ."""
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    published, run, steps = tmp_path / "results" / "tiny", tmp_path / "results" / "runs" / "tiny", list(STEPS)[:6]
    table, titles = tmp_path / "results" / "tables" / "ladder_seeds.csv", "benchmark,split,rung,images,mode,seed,miou\n"
    rows = [f'tiny,val,"{ROBUST}",8,selftrain,{k},{50 + 2 * k}\n' for k in range(3)]
    others = (("other", "val", ROBUST), ("tiny", "dev", ROBUST), ("tiny", "val", OURS))
    rows += [f'{name},{split},"{rung}",8,selftrain,0,10\n' for name, split, rung in others]
    write_text(table, "".join([titles, *rows]))

    def lay_out(*some: str, **parameters) -> None:
        for step in some or steps:
            content = {"step": step, "key": "k", "parameters": {"beta": 0.4, "seed": 1, "workers": 2} | parameters}
            write_text(run / step / "one.txt", "x")
            (run / step / "manifest.json").unlink(missing_ok=True)
            write_manifest(run / step, ["one.txt"], content)

    lay_out()
    assert reproduction(run, {"miou": 0.47}) is None  # nothing is published
    write_text(published / "summary.json", json.dumps({"miou": 0.52, "split": "val"}))
    for step in steps:
        write_text(published / "manifests" / f"{step}.json", json.dumps({"parameters": {"beta": 0.4, "seed": 0}}))
    found = reproduction(run, {"miou": 0.47})
    assert found["reproduced"] and found["tolerance"] == pytest.approx(0.1217, abs=1e-4) and found["published"] == 0.52
    assert "47.0 %; reproduced within 12.2" in reproduction_text(found)
    assert found["spread"] == pytest.approx(0.02)
    for miou in (0.39, 0.65):  # better is not the same either
        assert "NOT reproduced" in reproduction_text(reproduction(run, {"miou": miou}))
    for step in steps:
        lay_out(step, beta=0.3)
        assert reproduction(run, {"miou": 0.52}) is None, step
        lay_out(step)
    assert reproduction(run, {"miou": 0.52})["reproduced"]
    write_text(table, titles + rows[0])
    assert reproduction(run, {"miou": 0.52}) is None  # one seed has no spread


def test_a_run_of_one_notebook_becomes_a_page_to_which_the_others_link(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("nothing to fill\n")
    for name in ("mini-world/notebooks/00_mini_world", "tiny/notebooks/05_evaluation"):
        write_executed(tmp_path / "results" / "runs" / f"{name}.ipynb")
    assert main(["publish", str(tmp_path / "results" / "runs" / "mini-world")]) == 0
    write_pages(tmp_path / "results" / "runs" / "tiny", ["05_evaluation"])
    pages = tmp_path / "results" / "notebooks"
    assert (
        '<a href="../mini-world/00_mini_world.html">← 00_mini_world'
        in (pages / "tiny" / "05_evaluation.html").read_text()
    )
    assert (pages / "index.html").read_text().count("<li>") == 2
