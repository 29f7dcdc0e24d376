"""The charts that are drawn again from records and tables."""

import matplotlib.pyplot as plt
import pytest

from diffseg.charts import gains
from diffseg.experiments.noise import LINES, STRENGTHS, noise_figure
from diffseg.experiments.published_figures import BOXES, pipeline_figure, technique_gains
from diffseg.figures import COLOURS
from diffseg.files import read_rows
from diffseg.paths import project_root


def test_gains_are_paired_by_seed():
    """The order of runs does not matter, and a seed that only one of the two has does not count."""
    scores = {("plain", 0): 0.4, ("lora", 1): 0.47, ("plain", 1): 0.5, ("lora", 0): 0.45, ("lora", 2): 0.9}
    runs = {
        f"{name}-{seed}": {
            "configuration": name,
            "seed": seed,
            "steps": {"05_evaluation": {"metrics": {"synthetic": {"miou": miou}, "real": {"miou": 0.8}}}},
        }
        for (name, seed), miou in scores.items()
    }
    record = {"study": "s", "base": "mini-voc", "configurations": {"plain": {}, "lora": {}}, "runs": runs}
    found = technique_gains([record | {"versions": [{"diffseg": "0.3.0"}]}])
    ((heading, rows),) = found.items()
    assert heading == "s, mini-voc: over plain, version 0.3.0" and list(rows) == ["lora"]
    assert rows["lora"] == pytest.approx([5, -3])
    figure = gains(found)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["lora"]
    plt.close(figure)


def test_the_pipeline_marks_one_notebook():
    figure = pipeline_figure("03")
    filled = [
        box for box in figure.axes[0].patches if plt.matplotlib.colors.to_hex(box.get_facecolor()) == COLOURS[0].lower()
    ]
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {text for _, text in BOXES.values()} < texts and len(filled) == 1
    plt.close(figure)


def test_the_chart_of_noise_has_every_network_at_every_strength():
    """A row whose name the figure does not know would be left out in silence."""
    rows = read_rows(project_root() / "results" / "tables" / "noise_seeds.csv")
    assert {row["mode"] for row in rows} == set(LINES)
    figure = noise_figure(rows)
    for axis, strengths in zip(figure.axes, STRENGTHS.values(), strict=True):
        drawn = {line.get_label(): line.lines[0].get_xdata().tolist() for line in axis.containers}
        assert drawn == {name: [0, *strengths] for name in LINES.values()}
    plt.close(figure)
