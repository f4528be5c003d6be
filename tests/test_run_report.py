"""The page of a run, from files that were written by hand: what is there is shown, and what is not is said."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from test_sweep_report import Text

from experiments import quickstart
from unihetero_jax import run_report
from unihetero_jax.cli import main


def write_run(folder, steps=(10, 20), accuracy=0.8, **changes):
    """A run that has logged so many lines, with one evaluation and a sheet."""
    (folder / "eval").mkdir(parents=True)
    config = quickstart.get_config().to_dict() | changes
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {
            "step": step, "objective": config["objective"], "config_hash": "abc", "skipped_steps": 1,
            "terms": {"text": {"mean": 5.0 - step / 10}, "visual": {"mean": None}}, "step_time_s": 0.25,
            "tokens_per_s": 1000.0, "input_wait_share": 0.125, "model_flops_per_s": 2e9,
            "totals": {"samples/qa": step * 7, "samples/generation": step * 3, "failed/qa": 2, "pad_tokens": 99},
            "eval_loss": {"qa": {"text": [3.0, None]}} if step == steps[-1] else None,
        }
        for step in steps
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in (("scenes", accuracy), ("scenes_heldout", 0.7)):
        overall = {"accuracy": value, "standard_error": 0.01, "chance": 0.3, "answer_nll_per_token": 0.5}
        result = {"benchmark": name, "step": 20, "mode": "likelihood", "overall": overall}
        (folder / "eval" / f"{name}-20.json").write_text(json.dumps(result))
    Image.new("RGB", (4, 4)).save(folder / "sheet.png")
    return folder


def text_of(page):
    text = Text()
    text.feed(page)
    return text


def test_a_run_alone_shows_what_it_has_and_says_what_was_not_measured(tmp_path):
    folder = write_run(tmp_path / "run")
    page = text_of(run_report.render_run(folder, "A <run>"))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["scenes"] == ["this run", "20", "0", "likelihood", "0.800", "0.020", "0.300", "0.5000"]
    assert rows["qa"] == ["140", "2"] and rows["generation"] == ["60", "0"]
    assert rows["this run"] == ["0.25", "1,000", "2e+09", "0.125"]
    assert rows["generalisation across data kinds"][1:] == ["more than 0.05", "shows"]
    assert "0.100 lost" in rows["generalisation across data kinds"][0]
    assert rows["error accumulation over long sequences"][0].startswith("not measured: evaluate --rollout-judge")
    assert [image["alt"] for image in page.images] == [
        "text over the steps", "held-out text of qa over the steps", "Sheet sheet.png",
    ]  # fmt: skip
    assert not page.tags & {"script", "iframe", "link"}


def test_rollouts_that_depart_show_and_others_do_not(tmp_path):
    folder = write_run(tmp_path / "run")
    drawn = folder / "eval" / "drawings-20" / "drawn"
    drawn.mkdir(parents=True)
    for number in range(run_report.MAX_DRAWN + 3):
        Image.new("RGB", (4, 4)).save(drawn / f"{number:05d}.png")
    for low, shows in ((0.01, "shows"), (-0.01, "does not show")):
        result = {"growth": [0.02, low, 0.03], "horizon": [5.0, 4, 6], "curves": {"free_running": [0.5] * 9}}
        (folder / "eval" / "rollout-error-20.json").write_text(json.dumps(result))
        page = text_of(run_report.render_run(folder, "x"))
        (row,) = [row for row in page.rows if row and row[0] == "error accumulation over long sequences"]
        assert row[3] == shows and "after 5 of 9 positions" in row[1]
    assert sum(image["alt"] == "drawn at step 20" for image in page.images) == run_report.MAX_DRAWN


def test_the_command_draws_one_run_over_another_and_lists_their_differences(tmp_path, capsys, refused):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", accuracy=0.6, seed=7)
    assert main(["report", f"--workdir={run}", f"--against={other}"]) == 0
    assert f"see {run / 'report.html'}" in capsys.readouterr().out
    page = text_of((run / "report.html").read_text())
    assert ["seed: 0 -> 7"] in page.rows
    found = {tuple(row[:2]): row[5] for row in page.rows if len(row) == 9}
    assert "--against=nowhere: there is no metrics.jsonl" in refused("report", f"--workdir={run}", "--against=nowhere")
    assert "is of a sweep" in refused("report", f"--workdir={run}", "--protocol=x.json")
    assert found["scenes", "this run"] == "0.800" and found["scenes", "against"] == "0.600"


def test_curves_of_a_sweep_are_means_over_the_runs_of_an_arm(tmp_path, monkeypatch):
    for arm, seed in (("a-b", 0), ("a-b", 1), ("c", 0)):
        write_run(tmp_path / "runs" / f"{arm}-{seed}-abc")
    path = tmp_path / "runs" / "a-b-1-abc" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()][:1]
    lines[0]["terms"]["text"]["mean"] += 1.0
    path.write_text(json.dumps(lines[0]) + "\n")
    drawn = {}
    monkeypatch.setattr(run_report, "_curves", lambda title, curves, _: drawn.setdefault(title, curves) and "")
    write_run(tmp_path / "runs" / "c-0-stale", steps=(10,))
    names = {"a-b-0-abc", "a-b-1-abc", "c-0-abc"}
    run_report.curves_of_sweep(tmp_path, names)
    assert drawn == {"text": {"a-b": [(10, 4.5)], "c": [(10, 4.0), (20, 3.0)]}}
    assert run_report.curves_of_sweep(tmp_path / "nowhere", names) == ""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed (Debian: apt install chromium)")
def test_a_browser_shows_every_figure_and_complains_of_nothing(tmp_path):
    folder = write_run(tmp_path / "run")
    assert main(["report", f"--workdir={folder}"]) == 0
    page = (folder / "report.html").read_text()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--enable-logging=stderr"]
    # The page's own policy forbids scripts, so what was decoded is asked for in a copy without it.
    (tmp_path / "free.html").write_text(
        page.replace('http-equiv="Content-Security-Policy"', 'name="x"').replace(
            "</body>",
            "<script>document.title = [...document.images].map(i => i.naturalWidth).join()</script></body>",
        )
    )
    shown = {}
    for path in (folder / "report.html", tmp_path / "free.html"):
        ended = subprocess.run(
            ["chromium", *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        assert "CONSOLE" not in ended.stderr, ended.stderr
        shown[path.name] = ended.stdout
    assert "Failure signatures" in shown["report.html"]
    widths = re.search("<title>([0-9,]*)</title>", shown["free.html"])[1].split(",")
    assert len(widths) == 3 and all(int(width) > 0 for width in widths)


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_a_run_says_so(tmp_path, refused, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    message = refused("report", f"--workdir={tmp_path}")
    assert str(tmp_path) in message and ("name the folder of a run" in message or "no line yet" in message)
