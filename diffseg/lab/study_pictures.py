"""What the networks of a study see in the same pictures, side by side: one row a configuration, its first seed.

Made from the predictions that step 5 leaves in each run's folder, so unlike the tables it needs the runs themselves.
"""

import numpy as np
from matplotlib.figure import Figure

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.labels import read_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.figures import overlay, picture_rows
from diffseg.lab.runs import step_notebooks, step_parameters
from diffseg.lab.studies import Study
from diffseg.lab.study_results import EVALUATION

PREDICTIONS = f"{EVALUATION}/predictions/synthetic"


def predictions_figure(study: Study, columns: int = 8) -> Figure | None:
    """Draw pictures evenly spaced over the validation split, their true masks, and each configuration's predictions.

    Of wide pictures a row has half as many. None where no run of the study's first seed has predictions. Raises a
    DiffsegError for predictions that are not whole.
    """
    runs = [run for run in study.runs if run.seed == study.seeds[0] and (run.folder / PREDICTIONS).is_dir()]
    if not runs:
        return None
    values = step_parameters(step_notebooks()[EVALUATION], runs[0].values)
    benchmark = get_benchmark(values["benchmark"], values["class_list"])
    validation = open_split(benchmark, data_folder(values["data_root"]), benchmark.evaluation_split)
    _, height, width = validation[0][1].shape
    size = 1.0
    if width > 1.5 * height:
        columns, size = columns // 2, 2.0
    places = np.linspace(0, len(validation) - 1, min(columns, len(validation))).astype(int)
    shown = [validation[k] for k in places]
    rows = {
        "picture": [image for _, image, _ in shown],
        "true mask": [overlay(image, label, benchmark.palette) for _, image, label in shown],
    }
    for run in runs:
        folder = run.folder / PREDICTIONS
        rows[run.configuration] = [
            overlay(image, read_prediction(folder, name, benchmark, tuple(label.shape)), benchmark.palette)
            for name, image, label in shown
        ]
    return picture_rows(rows, size=size)
