"""The charts that are drawn again from records and tables."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from diffseg.charts import gains
from diffseg.experiments.ladder import UNTUNED
from diffseg.experiments.noise import COMPARED, STRENGTHS, noise_figure
from diffseg.experiments.published_figures import BOXES, gains_table, pipeline_figure, technique_gains
from diffseg.figures import COLOURS
from diffseg.lab.report import OURS
from diffseg.paths import project_root


def test_gains_are_paired_by_seed():
    """The order of rows does not matter, and a seed that only one of the two has does not count."""
    scores = {(OURS, 1): 47, (UNTUNED, 0): 40, (OURS, 0): 45, (UNTUNED, 1): 50, (OURS, 2): 90}
    ladder = [
        {"benchmark": "mini-cityscapes", "split": "validation", "rung": rung, "seed": str(seed), "miou": str(miou)}
        for (rung, seed), miou in scores.items()
    ]
    arms = pd.DataFrame(
        {"run": "mini-voc-unrefined", "split": "val", "arm": arm, "seed": seed, "miou": miou}
        for arm, seed, miou in (("restricted", 0, 70), ("ensemble, first network", 0, 66), ("restricted", 1, 71))
    )
    found = technique_gains(ladder, arms)
    assert found == {
        "mini VOC, masks without a refiner": {"restricted co-training": [4]},
        "mini Cityscapes": {"LoRA": [5, -3]},
    }
    figure = gains(found)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["restricted co-training", "LoRA"]
    row = gains_table(found).set_index("technique").loc["LoRA"]
    assert row.gain == 1 and row.seeds == 2
    assert (row.gain_low, row.gain_high) == pytest.approx((1 - 12.706 * 4, 1 + 12.706 * 4), abs=0.01)  # t of 1 degree
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
    rows = pd.read_csv(project_root() / "results" / "tables" / "noise_seeds.csv")
    assert set(rows.arm) <= set(COMPARED)
    figure = noise_figure(rows)
    for axis in figure.axes:
        drawn = {line.get_label(): line.lines[0].get_xdata().tolist() for line in axis.containers}
        tried = set(rows[rows.kind == axis.get_title()].arm)
        assert drawn == {arm: [0, *STRENGTHS[axis.get_title()]] for arm in tried}
    assert {axis.get_title() for axis in figure.axes} == set(rows.kind) - {"none"}
    plt.close(figure)
