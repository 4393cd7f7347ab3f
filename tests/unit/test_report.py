"""tools/report.py, analysis/report.py and analysis/runs.py: reports of good, damaged, foreign and many runs.

pytest tests/unit/test_report.py
"""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from helpers.browser import chromium
from helpers.evaluations import add_set, random_logits, write_evaluation
from helpers.run_dirs import ATTACK, CLASSES, write_run
from PIL import Image

from analysis import statistics as st
from analysis import tables
from analysis.report_charts import comparison_charts, group_runs
from analysis.runs import Series, read_run, smooth, thin
from analysis.scores import read_scores, write_scores
from tools import report


def add_evaluation(run, name: str = "400-model", bad: tuple[int, ...] = ()):
    """The evaluation of 80 images of 8 classes, one of which is called like a script."""
    folder = write_evaluation(run / "eval" / name, [f"c{i}" for i in range(8)], names=CLASSES)
    logits, label = random_logits(80, 8, skill=1.0)
    files = [f"c{c}/{'<b>' if i == 3 else ''}{i:05d}.JPEG" for i, c in enumerate(label)]
    add_set(folder, "val", logits, label, files=files, bad=bad)
    write_scores(folder)
    return folder


def report_of(*runs, more: tuple[str, ...] = ()) -> str:
    out = runs[0] / "page.html"
    assert report.main([*map(str, runs), "--out", str(out), *more]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run with an evaluation; not to be changed."""
    run = write_run(tmp_path_factory.mktemp("report"), tag="<b>tag")
    add_evaluation(run)
    return run


@pytest.fixture(scope="module")
def page(run):
    return report_of(run)


def words(page: str) -> str:
    """The page's text, without scripts, styles and pictures."""
    page = re.sub(r"<(script|style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("&#39;", "'").split())


def test_the_report_says_how_the_run_went(run, page):
    text = words(page)
    best = read_run(run).best()
    assert "The run is complete." in text
    assert "step 400 of 400 (100 %), epoch 4.0 of 4" in text
    assert f"{best[0]:.2f} % (weights, step 400)" in text
    low, high = st.wilson(round(best[0] * 355 / 100), 355)
    assert f"95 % interval {100 * low:.2f} to {100 * high:.2f}, 355 images" in text
    assert "top-1 of at least 97 on the 355 validation images" in text  # of configs/digits.yaml
    assert "What differs from configs/digits.yaml" in text
    assert re.search(r"TRAIN\.EPOCHS 4 16 --opts", text)
    assert "compute-bound" in text
    assert "Nothing was skipped, unreadable or damaged." in text
    assert "ffffffffffffffff…" in text


def test_the_report_has_the_evaluations_numbers(run, page):
    scores = read_scores(run / "eval" / "400-model")
    row, found = scores["suite"]["rows"][0], scores["sets"]["val"]
    text = words(page)
    assert f"{row['top1']:.3f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" in text
    one = found["confusions"][0]
    assert f"{one['images']} of {one['of']}" in text
    assert page.count("<figcaption>") == 3
    mistakes = re.search(r'<ul class="mistakes">(.*?)</ul>', page, re.DOTALL)[1]
    assert mistakes.count("<li>") == 24
    confidences = [float(p) for p in re.findall(r"</strong> ([\d.]+) %", mistakes)]
    assert confidences == sorted(confidences, reverse=True)


def test_equal_inputs_give_equal_bytes(run, page):
    assert report_of(run) == page


def test_the_page_loads_nothing_and_runs_nothing_foreign(page):
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src &#39;none&#39;; img-src data:;")
    scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # our own
    assert ATTACK not in page
    assert "<script>document" not in page
    assert "<b>00003" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', scripts)
    assert not re.findall(r"url\((?!data:|#)", scripts)
    assert not re.findall(r"<[^>]+ on\w+=", scripts)
    assert set(re.findall(r"https?://[^\"' ]+", scripts)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_is_complete_without_scripts(page):
    """Every curve is a still picture too."""
    still = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    charts = re.findall(r'<figure data-chart="\d+"><h3>(.*?)</h3><div class="still"><svg', still)
    assert charts[:2] == ["Loss", "Validation top-1 in %"]
    assert len(charts) == 6
    assert "currentColor" in still


def test_budgets(run, page, tmp_path):
    assert len(page.encode()) < 400_000
    ten = [write_run(tmp_path, seed=seed, steps=4000) for seed in range(10)]
    assert len(report_of(*ten).encode()) < 1_000_000


def test_seeds_have_mean_and_interval(tmp_path):
    seeds = [write_run(tmp_path, seed=seed) for seed in range(3)]
    others = [
        write_run(tmp_path, seed=seed, tag="slow", accuracy=60, BASE_LR=0.0001) for seed in (5, 6)
    ]
    text = words(report_of(*seeds, *others))
    values = [read_run(one).last_accuracy() for one in seeds]
    mean = st.mean_of_runs(values)
    assert f"{mean.value:.2f} ± {mean.interval.high - mean.value:.2f}" in text
    assert "dat_micro, BASE_LR 0.001 3" in text
    assert "dat_micro, BASE_LR 0.0001 2" in text
    assert "TRAIN.BASE_LR 0.001 0.0001" in text
    assert "SEED" not in text.partition("Settings")[2]


def test_runs_that_are_not_finished_are_left_out_of_means(tmp_path):
    seeds = [write_run(tmp_path, seed=seed) for seed in range(3)]
    finals = [read_run(one).last_accuracy() for one in seeds]
    (seeds[2] / "status.json").write_text('{"state": "interrupted"}')
    text = words(report_of(*seeds))
    assert f"{tables.format_runs(finals[:2])}, without 1 unfinished run" in text
    runs = [read_run(one) for one in seeds]
    [accuracy, *_] = comparison_charts(runs, group_runs(runs, {"SEED"}))
    assert accuracy.lines[-1].y[-1] == np.mean(finals[:2])


def test_runs_of_unknown_settings_form_no_group(tmp_path):
    runs = [write_run(tmp_path, seed=seed) for seed in range(4)]
    for run in runs[:2]:
        (run / "config.yaml").unlink()
    groups = group_runs([read_run(run) for run in runs], {"SEED"})
    assert [len(group.runs) for group in groups] == [1, 1, 2]
    assert [group.title for group in groups[:2]] == ["seed0/run", "seed1/run"]


def test_runs_of_the_same_name_have_different_names(tmp_path):
    runs = [write_run(tmp_path / output, seed=0, steps=40) for output in ("a", "b")]
    runs.append(write_run(tmp_path / "b", seed=1, steps=40))
    for run in runs:
        add_evaluation(run)
    page = report_of(*runs)
    names = re.findall(r'<td title="[^"]*"><span[^>]*></span>(.*?)</td>', page)
    assert names == ["a/seed0/run", "b/seed0/run", "seed1/run"]
    assert re.findall(r"<h3>(.*?): .*?\(400-model\)</h3>", page) == names


def test_accuracies_that_were_never_finite_are_survived(tmp_path):
    run = write_run(tmp_path)
    file = run / "metrics.jsonl"
    file.write_text(re.sub(r'"val/acc1": [^,]*', '"val/acc1": NaN', file.read_text()))
    assert read_run(run).best() is None
    assert "accuracy never finite" in words(report_of(run))


def test_two_hundred_runs(tmp_path):
    first = write_run(tmp_path, seed=0, steps=40)
    runs = [first]
    for number in range(1, 200):
        runs.append(tmp_path / f"copy{number}")
        shutil.copytree(first, runs[-1])
    page = report_of(*runs)
    assert len(page.encode()) < 3_000_000
    assert "200 runs" in words(page)


def test_a_damaged_metrics_file_shows_its_good_part_and_names_the_line(tmp_path):
    run = write_run(tmp_path)
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:6], b'{"step": 7, "train/lo\n', b"\xff\xfe\n", *lines[8:]]))
    (run / "timing.jsonl").write_text("[")
    text = words(report_of(run))
    assert "metrics.jsonl, line 7: damaged, left out" in text
    assert "metrics.jsonl, line 8: damaged, left out" in text
    assert "timing.jsonl, line 1: damaged, left out" in text
    assert "step 400 of 400" in text


def test_missing_files_are_left_out(tmp_path):
    run = write_run(tmp_path)
    for name in ("config.yaml", "sources.json", "timing.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    text = words(report_of(run))
    assert "No checkpoint yet." in text
    assert "None yet." in text  # evaluations
    (run / "metrics.jsonl").write_text("")
    text = words(report_of(run))
    assert "No records yet." in text
    assert "no validation yet" in text


def test_broken_values_are_survived(tmp_path):
    run = write_run(tmp_path)
    (run / "status.json").write_text('{"sta')
    (run / "config.yaml").write_text("a: [")
    (run / "sources.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 401, "train/loss": NaN, "train/grad_norm": Infinity, "val/acc1": NaN}\n'
        )
    (run / "skipped.jsonl").write_text('{"step": 9, "micro_batches": [["a.jpg"]]}\n')
    (run / "bad_samples.jsonl").write_text(
        '{"path": "b.jpg", "reason": "cut", "epoch": 0, "index": 1}\n[]\n'
    )
    (run / "checkpoints" / "step-400" / "manifest.json").write_text("{")
    (run / "diverged-8").mkdir()
    text = words(report_of(run))
    for expected in (
        *(
            "status.json cannot be read",
            "config.yaml cannot be read",
            "sources.json holds no object",
        ),
        *("steps without a finite gradient 1", "unreadable training images 1", "diverged-8"),
        *("bad_samples.jsonl, line 2", "lists no model.safetensors"),
    ):
        assert expected in text


def test_settings_that_are_no_groups_are_survived(tmp_path):
    run = write_run(tmp_path)
    (run / "config.yaml").write_text("TRAIN:\nMODEL: 3\nTEST: [a]\n")
    assert read_run(run).config == {"TRAIN": None, "MODEL": 3, "TEST": ["a"]}


def test_a_damaged_evaluation_is_named(tmp_path):
    run = write_run(tmp_path, steps=40)
    folder = add_evaluation(run)
    (folder / "val.csv").write_text((folder / "val.csv").read_text()[:-200])
    assert "cannot be read" in words(report_of(run)).partition("Evaluations")[2]


def test_mistakes_have_pictures_where_the_data_are_there(run, tmp_path):
    for file in sorted(read_run(run).evaluations[0].glob("val.csv")):
        for line in file.read_text().splitlines()[1:]:
            path = tmp_path / "val" / line.split(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (200, 30, 30)).save(path, "JPEG")
    page = report_of(run, more=("--data-path", str(tmp_path)))
    assert page.count('<img src="data:image/jpeg') == 24
    assert "This file holds pictures" in words(page)


def test_data_without_val_cost_an_evaluation_its_pictures_alone(run, tmp_path, caplog):
    (tmp_path / "train" / "c0").mkdir(parents=True)
    text = words(report_of(run, more=("--data-path", str(tmp_path))))
    assert "cannot be read" not in text
    assert "Most confident mistakes" in text
    [record] = caplog.records
    assert "the pictures of mistakes are left out" in record.message


def test_mistakes_on_a_part_of_train_have_pictures_of_train(run, tmp_path):
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (30, 20), (30, 200, 30)).save(tmp_path / "green.png")
    for split, colour in (("train", "red"), ("val", "green")):
        (tmp_path / split / "class_0").mkdir(parents=True)
        (tmp_path / f"{colour}.png").rename(tmp_path / split / "class_0/7.png")
    mistakes = report.Mistakes(tmp_path)
    name = "class_0/7.png"
    found = {
        source: mistakes(f"/data/{source}", name) for source in ("train.zip", "val.zip", "val")
    }
    assert found["train.zip"] != found["val.zip"] == found["val"]
    assert mistakes("/data/train", "class_0/8.png") is None


def test_the_evaluations_of_several_runs_have_their_names(tmp_path):
    runs = [write_run(tmp_path, seed=seed) for seed in range(2)]
    for run in runs:
        add_evaluation(run)
    page = report_of(*runs)
    titles = re.findall(r"<h3>(.*?\(400-model\))</h3>", page)
    assert len(set(titles)) == len(titles) == 2
    identifiers = re.findall(r' id="(evaluation[^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers) > 0


def test_runs_without_an_epoch_are_compared_by_steps(tmp_path):
    known = read_run(write_run(tmp_path))
    unknown = dataclasses.replace(known, metadata={}, metrics=known.metrics.copy())
    del unknown.metrics["epoch"]
    for compared, unit in (([known, known], "epoch"), ([known, unknown], "step")):
        charts = comparison_charts(compared, group_runs(compared, {"SEED", "TAG"}))
        assert {chart.x_label for chart in charts} == {unit}


def test_of_files_that_build_on_each_other_the_last_is_the_recipe(tmp_path):
    run = write_run(tmp_path)
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("# Expected: the base.\nTAG: base\nMODEL: {NAME: dat_micro}\nSEED: 0\n")
    top.write_text("# Expected: the top.\nBASE: base.yaml\nTAG: run\n")
    sources = {"MODEL.NAME": f"{base}:3", "SEED": f"{base}:4", "TAG": f"{top}:3"}
    (run / "sources.json").write_text(json.dumps(sources))
    assert "expected the top." in words(report_of(run))


def test_a_recipe_that_is_elsewhere_is_named(tmp_path):
    run = write_run(tmp_path)
    file = run / "sources.json"
    file.write_text(json.dumps({"TRAIN.EPOCHS": "elsewhere/mine.yaml:3"}))
    assert "The run was started with elsewhere/mine.yaml, which cannot be read" in words(
        report_of(run)
    )


@pytest.mark.parametrize(
    ("code", "message", "more"),
    [
        (2, "absent is no run", ["absent"]),
        (2, "--pictures needs one run", ["RUN", "OTHER", "--pictures", "a.jpg"]),
        (2, "a run is named twice", ["RUN", "RUN"]),
        (6, "no such folder for --out", ["RUN", "--out", "absent/report.html"]),
        (3, "absent", ["RUN", "--data-path", "absent"]),
    ],
)
def test_wrong_commands_are_answered_in_one_line(run, tmp_path, capsys, code, message, more):
    other = write_run(tmp_path, seed=3)
    arguments = [{"RUN": str(run), "OTHER": str(other)}.get(word, word) for word in more]
    assert report.main(arguments) == code
    assert message in capsys.readouterr().err


def test_thin_keeps_spikes():
    values = np.zeros(10_000)
    values[[17, 5_000]] = 9, -9
    found = thin(Series(np.arange(10_000), values), 100)
    assert len(found.steps) <= 100
    assert {17, 5_000, 0, 9_999} <= set(found.steps.tolist())


def test_smoothing_is_a_running_mean_that_skips_what_is_not_finite():
    series = Series(np.arange(100), np.where(np.arange(100) == 50, np.nan, np.arange(100.0)))
    found = smooth(series, share=0.03).values
    assert found[10] == 10
    assert found[50] == 50  # of its neighbours
    assert np.isfinite(found).all()


def test_the_curves_are_drawn_and_nothing_runs(run, page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html", "document.body?.hasAttribute('data-ready')")
        assert browser.run("document.querySelectorAll('.uplot canvas').length") == 6
        assert browser.run("getComputedStyle(document.querySelector('.still')).display") == "none"
        assert browser.run("document.title") == read_run(run).name
        assert "The run is complete." in browser.text(".verdict")
        assert ATTACK in browser.run("document.body.textContent")
        assert browser.problems == []
