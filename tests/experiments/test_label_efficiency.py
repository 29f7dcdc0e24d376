"""How many labelled images synthetic ones replace: the trainings of every arm at tiny size, and the paired gains."""

import pandas as pd
import pytest

from diffseg.errors import DiffsegError
from diffseg.experiments import label_efficiency as study
from diffseg.experiments.paired import paired_gain, with_earlier


def test_a_gain_is_paired_by_seed_and_has_students_interval():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2 degrees of freedom) = 4.3027."""
    mean, low, high = paired_gain({0: 51, 1: 62, 2: 43, 7: 90}, {0: 50, 1: 60, 2: 40})
    assert mean == 2 and (high - mean, mean - low) == pytest.approx((4.3027 / 3**0.5,) * 2, abs=1e-3)
    assert all(value != value for value in paired_gain({0: 51}, {0: 50}))


def test_gains_are_over_as_many_real_images_alone():
    rows = [
        {"arm": arm, "labelled": count, "seed": seed, "miou": value + seed}
        for (arm, count), value in {
            (study.AFTER, 0): 70,
            (study.ALONE, 20): 30,
            (study.MIXED, 20): 72,
            (study.ALONE, 45): 40,
            (study.MIXED, 45): 75,
        }.items()
        for seed in range(3)
    ]
    table = study.means(pd.DataFrame(rows)).set_index(["arm", "labelled"])
    assert table.loc[(study.MIXED, 20), ["miou", "gain", "gain_low", "gain_high"]].tolist() == [73, 42, 42, 42]
    assert table.loc[(study.MIXED, 45), "gain"] == 35 and table.gain.isna().sum() == 3
    assert study.label_figure(pd.DataFrame(rows)).axes[0].get_legend()


def test_a_run_without_images_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_folder", lambda name: tmp_path / name)
    with pytest.raises(DiffsegError, match="--only 1-3"):
        study.main(["mini-voc", "--finer", "mini-imagenet-s", "--folder", str(tmp_path), "--out", str(tmp_path)])


def test_rows_of_earlier_calls_stay_unless_made_anew_or_on_other_images(tmp_path):
    earlier = pd.DataFrame({"arm": ["alone", "alone", "mixed"], "seed": [0, 1, 0], "miou": [50.0, 51.0, 60.0]})
    made = pd.DataFrame({"arm": ["alone", "after"], "seed": [1, 0], "miou": [52.0, 70.0]})
    table, training = tmp_path / "some_seeds.csv", ["arm", "seed"]
    assert with_earlier(made, table, training, {"images": "a"}) is made  # there is no table yet
    earlier.to_csv(table, index=False)
    (tmp_path / "some.json").write_text('{"images": "a", "versions": {}}')
    kept = with_earlier(made, table, training, {"images": "a"})
    assert kept.set_index(training).miou.to_dict() == {
        ("alone", 0): 50,
        ("mixed", 0): 60,
        ("alone", 1): 52,
        ("after", 0): 70,
    }
    assert with_earlier(made, table, training, {"images": "b"}) is made
