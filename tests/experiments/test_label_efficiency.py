"""How many labelled images synthetic ones replace: the trainings of every arm at tiny size, and the paired gains."""

from argparse import Namespace

import pandas as pd
import pytest
from tiny_training import OPTIONS, STEP4, finish_images, recording

from diffseg.benchmarks.classes import VOC, get_benchmark
from diffseg.errors import DiffsegError
from diffseg.experiments import label_efficiency as study
from diffseg.experiments.paired import network_folder, paired_gain, with_earlier


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


def test_each_seed_has_its_own_labelled_images_and_its_own_start(tmp_path, monkeypatch):
    calls, fine = recording(monkeypatch, study), get_benchmark("mini-imagenet-s")
    monkeypatch.setattr(study, "resolve", lambda name, _: ({"benchmark": {"fine": fine.name}[name]}, None))
    monkeypatch.setattr(study, "run_folder", lambda name: tmp_path / name)
    for name in ("coarse", "fine"):
        finish_images(tmp_path / name)
    parameters = STEP4 | {"benchmark": "voc", "run": "coarse", "data_root": "a/root"}
    whole, half = OPTIONS.iterations, OPTIONS.iterations // 2
    chosen = Namespace(parameters="coarse", finer="fine", counts=[3, 5], split="dev", seeds=2, folder=tmp_path)
    rows = study.trainings(chosen, parameters)
    assert all(row["miou"] == 10 + row["seed"] for row in rows) and len(rows) == 2 * (1 + 2 * 4)
    asked = {(call.name, call.seed): call for call in calls}
    assert len(asked) == len(calls)  # no two trainings share a place
    numbers, labelled = {arm: k for k, arm in enumerate(study.ARMS)}, {}
    for seed in range(2):
        starts = {}
        for arm, run, classes in ((study.AFTER, "coarse", VOC), (study.FINER, "fine", fine)):
            call = asked[f"start-{numbers[arm]}", seed]
            assert (call.images, call.benchmark.name) == (f"key of {run}", classes.name)
            assert call.dataset[0] == f"{run} 0" and call.options.iterations == half
            how = call.folder, call.name, call.images, call.parameters, call.options
            starts[arm] = str(network_folder(*how, seed).resolve())
        call = asked[f"{numbers[study.AFTER]}-0", seed]
        assert (call.images, call.options.iterations, len(call.dataset)) == ("key of coarse", whole, 6)
        for count in (3, 5):
            alone, mixed = (asked[f"{numbers[arm]}-{count}", seed] for arm in (study.ALONE, study.MIXED))
            images = labelled[seed, count] = [alone.dataset[k] for k in range(len(alone.dataset))]
            assert len(set(images)) == count and (alone.options.iterations, alone.images) == (whole, "a/root root")
            for arm, rate in ((study.AFTER, study.RATES[study.AFTER]), (study.FINER, OPTIONS.learning_rate)):
                call = asked[f"{numbers[arm]}-{count}", seed]
                assert call.parameters["initial_network"] == starts[arm] and call.images == "a/root root"
                assert (call.options.iterations, call.options.learning_rate) == (half, rate)
                assert [call.dataset[k] for k in range(count)] == images
            shown = [mixed.dataset[k] for k in range(len(mixed.dataset))]
            assert mixed.images == "key of coarse a/root root"
            assert shown == [f"coarse {k}" for k in range(6)] + images * (6 // count)
        assert labelled[seed, 5][:3] == labelled[seed, 3]  # nested
    assert set(labelled[0, 5]) != set(labelled[1, 5])


def test_rows_of_an_earlier_call_stay_apart_by_all_that_names_a_training(tmp_path, monkeypatch):
    for name, value in {
        "resolve": lambda *_: ({}, None),
        "training_parameters": lambda *_: {},
        "images_key": lambda run: "key",
        "label_figure": lambda rows: None,
        "save_figure": lambda *_: None,
    }.items():
        monkeypatch.setattr(study, name, value)

    def call(scores: dict, *options: str) -> dict:
        rows = [{"arm": study.ALONE, "labelled": n, "seed": seed, "miou": miou} for (n, seed), miou in scores.items()]
        monkeypatch.setattr(study, "trainings", lambda *_: rows)
        study.main(["mini-voc", "--finer", "mini-imagenet-s", "--out", str(tmp_path), *options])
        table = pd.read_csv(tmp_path / "tables" / "label_efficiency_seeds.csv")
        return table.set_index(["labelled", "seed"]).miou.to_dict()

    first = {(20, 0): 50, (20, 1): 51, (45, 0): 52}
    assert call(first) == first
    assert call({(45, 0): 60, (45, 1): 61}) == first | {(45, 0): 60, (45, 1): 61}
    assert call({(45, 0): 70}, "--split", "dev") == {(45, 0): 70}  # other scores: none of the earlier ones stays
