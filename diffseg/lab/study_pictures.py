"""What the networks of a study see in the same images, side by side: one row a configuration, its first seed.

Made from the predictions that step 5 leaves in its folder, so unlike the tables it needs the steps themselves.
"""

import numpy as np
from matplotlib.figure import Figure

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.labels import read_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.figures import overlay, picture_rows
from diffseg.lab.batch import step_parameters
from diffseg.lab.steps import notebook_of
from diffseg.lab.studies import Study, finished_steps


def predictions_figure(study: Study, columns: int = 8) -> Figure | None:
    """Draw images evenly spaced over the validation split, their ground truth, and each configuration's predictions.

    Of wide images a row has half as many. None where no finished run of the study's first seed has predictions. Raises
    a DiffsegError for predictions that are not whole.
    """
    runs = [run for run in study.runs if run.seed == study.seeds[0]]
    found = {run.configuration: (finished_steps(study, run) or {}).get("05_evaluation") for run in runs}
    folders = {name: step / "predictions" / "synthetic" for name, step in found.items() if step}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if not folders:
        return None
    values = step_parameters(notebook_of("05_evaluation"), runs[0].values)
    benchmark = get_benchmark(values["benchmark"], values["class_list"])
    validation = open_split(benchmark, data_folder(values["data_root"]), benchmark.evaluation_split)
    _, height, width = validation[0][1].shape
    size = 2.0 if width > 1.5 * height else 1.0
    count = min(round(columns / size), len(validation))
    shown = [validation[k] for k in np.linspace(0, len(validation) - 1, count).astype(int)]
    rows = {
        "image": [image for _, image, _ in shown],
        "ground truth": [overlay(image, label, benchmark.palette) for _, image, label in shown],
    }
    for configuration, folder in folders.items():
        rows[configuration] = [
            overlay(image, read_prediction(folder, name, benchmark, tuple(label.shape)), benchmark.palette)
            for name, image, label in shown
        ]
    return picture_rows(rows, size=size)
