"""Metric lines, interval means, speed and progress."""

import io
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from unihetero_jax.metrics import IntervalMetrics, MetricsWriter, Progress, StepTimer, read_metrics


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensorboard_scalars(folder):
    """{tag: {step: value}} straight from the event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_lines_keep_full_precision_and_reach_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path)
    loss = 1.0 / 3.0
    writer.write(
        3,
        {
            "loss": loss,
            "f32": jnp.float32(0.1),
            "source": {"qa": {"tokens": np.int64(2**53 + 1)}},
            "note": "x",
            "none": None,
        },
    )
    first = lines_of(tmp_path / "metrics.jsonl")  # on disk before close
    writer.write(4, {"loss": np.array([0.5, math.nan]), "batch_hash": 2**63 + 11, "ids": ["a", "b"], "inf": -math.inf})
    writer.close()
    assert first == [
        {
            "step": 3,
            "loss": loss,
            "f32": float(np.float32(0.1)),
            "source": {"qa": {"tokens": 2**53 + 1}},
            "note": "x",
            "none": None,
        }
    ]
    second = lines_of(tmp_path / "metrics.jsonl")[1]
    assert second == {"step": 4, "loss": [0.5, "NaN"], "batch_hash": 2**63 + 11, "ids": ["a", "b"], "inf": "-Infinity"}
    assert math.isnan(float(second["loss"][1])) and float(second["inf"]) == -math.inf
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert scalars["loss"][3] == np.float32(loss) and scalars["loss/0"][4] == 0.5
    assert scalars["source/qa/tokens"][3] == np.float32(2**53 + 1) and "note" not in scalars and "ids" not in scalars


def test_resume_moves_later_lines_and_drops_a_torn_one(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 8):
        writer.write(step, {"loss": step / 3})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    original = path.read_text().splitlines(keepends=True)
    path.write_text("".join(original) + '{"step": 8, "lo')
    messages = []
    resumed = MetricsWriter(tmp_path, messages.append)
    assert resumed.truncate_after(4) == (3, 1)
    assert "3 lines beyond step 4" in messages[0] and "1 torn line" in messages[0]
    assert path.read_text().splitlines(keepends=True) == original[:4]
    assert (tmp_path / "metrics.replaced.jsonl").read_text().splitlines(keepends=True) == original[4:]
    resumed.write(5, {"loss": 0.0})
    assert resumed.truncate_after(4) == (1, 0)  # again, on top of what was replaced before
    resumed.close()
    assert len(lines_of(tmp_path / "metrics.replaced.jsonl")) == 4
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_nothing_to_do_changes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, pytest.fail)
    assert writer.truncate_after(0) == (0, 0)
    writer.write(1, {"loss": 0.5})
    assert writer.truncate_after(1) == (0, 0)
    assert not (tmp_path / "metrics.replaced.jsonl").exists()


@pytest.mark.parametrize("size", range(120))
def test_a_kill_at_any_byte_loses_no_complete_line(tmp_path, size):
    whole = "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(whole[:size])
    writer = MetricsWriter(tmp_path, lambda _: None)
    writer.truncate_after(2)
    complete = [line for line in whole.splitlines() if whole[:size].find(line) >= 0]
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    replaced = tmp_path / "metrics.replaced.jsonl"
    moved = replaced.read_text().splitlines() if replaced.exists() else []
    assert kept + moved == complete
    writer.write(3, {"loss": 0.25})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, len(kept) + 1), 3]


def test_kill_between_the_two_files_moves_lines_once(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "metrics.replaced.jsonl").write_text("".join(lines[1:]))  # appended, then killed
    MetricsWriter(tmp_path, lambda _: None).truncate_after(1)
    assert (tmp_path / "metrics.replaced.jsonl").read_text() == "".join(lines[1:])
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0]


def test_damaged_line_in_the_middle_is_kept(tmp_path):
    text = '{"step": 1}\nnot json\n{"step": 2}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert MetricsWriter(tmp_path, lambda _: None).truncate_after(2) == (1, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nnot json\n{"step": 2}\n'


def test_interval_metrics_divide_once():
    interval = IntervalMetrics()
    interval.add({"text": jnp.float32(6.0), "visual": np.array([1.0, 2.0])}, {"text": 2, "visual": np.array([1, 0])})
    interval.add({"text": 1.0, "visual": np.array([3.0, 0.0])}, {"text": 8, "visual": np.array([3, 0])})
    result = interval.result()
    assert result["text"] == {"sum": 7.0, "count": 10.0, "mean": 0.7}
    np.testing.assert_array_equal(result["visual"]["mean"], [1.0, np.inf])
    assert interval.result() == {}
    interval.add({"text": 0.0}, {"text": 0})
    assert math.isnan(interval.result()["text"]["mean"])
    with pytest.raises(ValueError, match="terms"):
        interval.add({"a": 1.0}, {"b": 1.0})


def test_interval_sums_do_not_lose_small_terms():
    interval = IntervalMetrics()
    interval.add({"loss": np.float32(2**24)}, {"loss": 1})
    for _ in range(10):
        interval.add({"loss": np.float32(1.0)}, {"loss": 1})
    assert interval.result()["loss"]["sum"] == 2**24 + 10  # float32 would stay at 2**24


def test_step_timer():
    now = [100.0]
    timer = StepTimer(lambda: now[0])
    with timer.phase("input_wait"):
        now[0] += 1.0
    now[0] += 3.0
    timer.add_step()
    timer.add_work(num_samples=8, num_tokens=100, model_flops=2e9)
    with timer.phase("eval"):
        now[0] += 50.0
    now[0] += 1.0
    timer.add_step()
    timer.add_work(num_samples=2, num_tokens=50, model_flops=3e9)
    assert timer.result() == {
        "step_time_s": 2.5, "steps_per_s": 0.4, "samples_per_s": 2.0, "tokens_per_s": 30.0,
        "model_flops_per_s": 1e9, "input_wait_share": 0.2,
    }  # fmt: skip
    now[0] += 1.0
    timer.add_step()
    timer.add_work(5, 5, 5.0)
    assert timer.result()["samples_per_s"] == 5.0


def test_goodput_accounts_for_every_second():
    now = [1000.0]

    def spend(seconds):
        now[0] += seconds

    timer = StepTimer(lambda: now[0], started_s=990.0)
    spend(5.0)
    assert timer.goodput()["start_up_s"] == timer.goodput()["wall_s"] == 15.0
    for number in range(3):
        with timer.phase("input_wait"):
            spend(0.5)
        with timer.phase("step" if number else "compile"):
            spend(2.0 if number else 30.0)
        with timer.phase("step"):
            spend(1.0)
        spend(0.25)
    with timer.phase("eval"):
        spend(4.0)
    with pytest.raises(KeyError), timer.phase("save"):
        spend(3.0)
        raise KeyError("counted though it failed")
    found = timer.goodput()
    assert found == {
        "goodput": 7.0 / 61.25, "wall_s": 61.25, "start_up_s": 15.0, "restore_s": 0.0, "compile_s": 30.0,
        "input_wait_s": 1.5, "step_s": 7.0, "eval_s": 4.0, "save_s": 3.0, "other_s": 0.75,
    }  # fmt: skip
    assert found["wall_s"] == sum(value for name, value in found.items() if name not in ("goodput", "wall_s"))
    timer.add_step()
    timer.result()
    assert timer.goodput() == found, "a report starts the rates anew, not the account of the run"


def test_a_run_begins_with_its_process_and_the_next_where_the_last_ended():
    code = (
        "import time; t = time.time(); time.sleep(0.3)\n"
        "from unihetero_jax.metrics import StepTimer\n"
        "first = StepTimer(); a = first.goodput()['wall_s']; b = time.time() - t\n"
        "first.close(); time.sleep(0.1)\n"
        "print(a - b, StepTimer().goodput()['wall_s'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    interpreter_s, second_s = map(float, ended.stdout.split())
    assert -0.05 < interpreter_s < 5.0, "it began with the interpreter, before the first line"
    assert 0.1 <= second_s < 0.3


def test_progress_prints_plain_lines_without_a_terminal():
    now, stream = [0.0], io.StringIO()
    progress = Progress(1000, first_step=100, stream=stream, clock=lambda: now[0])
    progress.update(101)
    now[0] = 100.0
    progress.report(200, {"loss": 1.23456, "text": np.float32(0.5)}, 12.34)
    progress.print("a message")
    progress.close()
    assert stream.getvalue() == "step 200/1000  loss 1.2346  text 0.5000  12.3 samples/s  13:20 left\na message\n"


def test_progress_on_a_terminal_is_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(10, first_step=4, stream=stream)
    progress.report(6, {"loss": 1.5}, 3.0)
    progress.print("between")
    progress.report(10, {"loss": 1.25}, 3.0)
    progress.close()
    text = stream.getvalue()
    assert "between\n" in text and "10/10" in text and "loss 1.2500  3.0 samples/s" in text


def test_import_needs_neither_tensorflow_nor_torch():
    code = "import sys, unihetero_jax.metrics; assert not {'tensorflow', 'torch', 'tensorboardX'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
