"""The loop from configuration to checkpointed state: what is written, what stops it, and what must not change it."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unihetero_jax import gradient_table, reporting, step
from unihetero_jax.checkpoint import list_steps, restore_subtree
from unihetero_jax.config import config_hash
from unihetero_jax.data import mixture
from unihetero_jax.data.mixture import make_train_iterator
from unihetero_jax.data.records import RecordError
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.metrics import read_metrics
from unihetero_jax.objectives import within_image_spread
from unihetero_jax.reporting import FAILED_SAMPLES, SKIPPED_BATCHES
from unihetero_jax.sharding import make_mesh
from unihetero_jax.train import train


def run(config, workdir, hooks=(), evaluate=None):
    """Trains with the proof of the gradient table in place: `test_gradient_table.py` makes it, and it takes seconds."""
    workdir.mkdir(exist_ok=True)
    proof = {"config_hash": config_hash(config), "norms": {}}
    (workdir / gradient_table.FILE_NAME).write_text(json.dumps(proof))
    return train(config, workdir, hooks, evaluate)


@pytest.fixture(scope="module")
def usual(tiny_experiment, tmp_path_factory):
    """An undisturbed run of 8 steps, saved every second, validated at its end only: (config, workdir, lines)."""
    workdir, config = tmp_path_factory.mktemp("usual"), tiny_experiment()
    evaluated = []
    state = run(config, workdir, evaluate=lambda state, step: evaluated.append((step, state)))
    assert evaluated == [(8, state)] and int(state.step) == 8
    return config, workdir, read_metrics(workdir)


def test_the_files_of_a_run(usual):
    _, workdir, lines = usual
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 8
    assert list_steps(workdir) == [6, 8] and not (workdir / "lock.json").exists()
    assert list((workdir / "tensorboard").iterdir()) and not (workdir / SKIPPED_BATCHES).exists()
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_each_line_tells_what_the_issue_names(usual):
    config, _, lines = usual
    for number, line in enumerate(lines, start=1):
        assert {
            "step", "loss", "batch_hash", "config_hash", "objective", "terms", "text_by_source", "visual_weight",
            "gradient_norm", "learning_rate", "skipped_steps", "totals", "alarms", "step_time_s", "steps_per_s",
            "samples_per_s", "tokens_per_s", "model_flops_per_s", "input_wait_share",
        } <= line.keys()  # fmt: skip
        assert line["config_hash"] == config_hash(config) and line["objective"] == "semantic_input"
        assert isinstance(line["batch_hash"], int) and 0 <= line["batch_hash"] < 2**64
        terms = line["terms"]
        assert {"text", "visual", "visual_copy_previous", "visual_mean_embedding", "within_spread"} <= terms.keys()
        for term in terms.values():
            assert term["mean"] == pytest.approx(term["sum"] / term["count"])
        # The parts make the whole: by source, and weighted to the loss.
        by_source = line["text_by_source"]
        assert by_source.keys() == {"qa", "generation"}
        assert sum(float(s["count"]) for s in by_source.values()) == terms["text"]["count"]
        assert sum(float(s["sum"]) for s in by_source.values()) == pytest.approx(terms["text"]["sum"], rel=1e-5)
        total = terms["text"]["mean"] + line["visual_weight"] * terms["visual"]["mean"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        start, end = config.loss.visual_weight_start, config.loss.visual_weight
        expected = start + (end - start) * (number - 1) / config.loss.visual_ramp_steps
        assert line["visual_weight"] == pytest.approx(expected, rel=1e-5)
        assert line["gradient_norm"]["encoder+projector+decoder+semantic_head"] > 0 and line["learning_rate"] > 0
        assert 0 <= line["input_wait_share"] <= 1 and line["tokens_per_s"] > 0 and line["model_flops_per_s"] > 0
    totals = [line["totals"] for line in lines]
    for name in ("samples/qa", "samples/generation", "tokens/qa", "tokens/generation"):
        counts = [total[name] for total in totals]
        assert counts == sorted(counts) and counts[-1] > counts[0], name
    assert [line["step"] for line in lines if "eval_loss" in line] == [8]
    assert lines[-1]["eval_loss"]["qa"]["text"] > 0 and lines[-1]["eval_loss"]["generation"]["visual"] > 0


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_save(tiny_experiment, tmp_path):
    """Whatever batches come, and while checkpoints are written: on a mesh, traces and compilations are counted."""
    counted, by_step = [], {}

    def count(event, *_, **__):
        if event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_trace_duration"):
            counted.append(event)

    config = tiny_experiment(mesh__data=2, mesh__fsdp=2, train__eval_every_steps=1000)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run(config, tmp_path, [lambda step, _: by_step.update({step: len(counted)})])
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert by_step[1] > 0, "the listener hears compilations"
    assert {by_step[step] for step in range(3, 8)} == {by_step[3]}, by_step
    tokens = {line["totals"]["pad_patches"] for line in read_metrics(tmp_path)}
    assert len(tokens) == 8, "batches differ"


@pytest.mark.slow
def test_validation_changes_nothing(usual, tiny_experiment, tmp_path):
    _, _, undisturbed = usual
    run(tiny_experiment(train__eval_every_steps=3), tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 8]
    for line, other in zip(lines, undisturbed, strict=True):
        for name in ("loss", "batch_hash", "terms", "gradient_norm", "totals"):
            assert line[name] == other[name], name
    assert lines[-1]["eval_loss"] == undisturbed[-1]["eval_loss"]


def test_objectives_share_data_and_initialisation(usual, tiny_experiment, tmp_path):
    config, _, lines = usual
    other = tiny_experiment(objective="understanding")
    run(other, tmp_path)
    understanding = read_metrics(tmp_path)
    assert [line["batch_hash"] for line in understanding] == [line["batch_hash"] for line in lines]
    assert [line["totals"] for line in understanding] == [line["totals"] for line in lines]
    assert understanding[0]["terms"]["text"] == pytest.approx(lines[0]["terms"]["text"], rel=1e-6), "same parameters"
    assert understanding[-1]["terms"]["text"]["sum"] != lines[-1]["terms"]["text"]["sum"], "other gradients"
    assert "visual" not in understanding[0]["terms"]
    mesh = make_mesh(config.mesh)
    ours, theirs = (jax.device_get(step.init_state(each, mesh).params) for each in (config, other))
    assert ours.keys() - theirs.keys() == {"semantic_head"}
    for name in theirs:
        jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])


def test_replicates_run_end_to_end(usual, tiny_experiment, tmp_path):
    _, _, lines = usual
    state = run(tiny_experiment(train__num_replicates=2), tmp_path)
    assert state.step.tolist() == [8, 8]
    for line, single in zip(read_metrics(tmp_path), lines, strict=True):
        assert line["batch_hash"] == single["batch_hash"] and line["totals"] == single["totals"]
        first, second = line["loss_by_replicate"]
        assert first == pytest.approx(single["loss"], rel=1e-3), "replicate 0 is the single run with the same seed"
        assert second != first and line["loss"] == pytest.approx((first + second) / 2, rel=1e-6)
    stored = restore_subtree(tmp_path, None, ["params"])[1]["params"]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(stored))


class _Poison:
    """A hook that makes a parameter NaN after some steps and puts it back after others; keeps every state it saw."""

    def __init__(self, after, cure_after):
        self._after, self._cure_after = after, cure_after
        self.states = {}

    def __call__(self, number, state):
        gains = state.params["projector"]["norm"]
        if number in self._after:
            self._healthy, gains["gain"] = gains["gain"], gains["gain"] * jnp.nan
        if number in self._cure_after:
            gains["gain"] = self._healthy
        self.states[number] = jax.device_get((state.params, state.ema, state.opt_state))


def test_failed_samples_are_written_down(tiny_experiment, tmp_path, monkeypatch):
    whole, calls = mixture.deserialize, itertools.count()

    def failing(data):
        if next(calls) % 7 == 3:
            raise RecordError("not_a_record", "for a test")
        return whole(data)

    monkeypatch.setattr(mixture, "deserialize", failing)
    run(tiny_experiment(train__num_steps=3, data__max_failed_share=1.0), tmp_path)
    entries = [json.loads(line) for line in (tmp_path / FAILED_SAMPLES).read_text().splitlines()]
    totals = read_metrics(tmp_path)[-1]["totals"]
    assert {entry["step"] for entry in entries} <= {1, 2, 3}
    failures = [failure for entry in entries for failure in entry["failures"]]
    assert (
        len(failures) == totals["failed/qa"] + totals["failed/generation"] == totals["failed_reason/not_a_record"] > 0
    )
    assert all(".array_record: record " in failure and "not_a_record: for a test" in failure for failure in failures)


def test_steps_without_finite_gradient_change_nothing_and_stop_the_run(usual, tiny_experiment, tmp_path, capsys):
    config = tiny_experiment(checkpoint__every_steps=4, train__max_consecutive_skips=2)
    poison = _Poison(after={2, 5}, cure_after={3})
    with pytest.raises(ValueError, match=r"2 steps in a row had no finite gradient .* the last one 7; the last check"):
        run(config, tmp_path, [poison])
    assert "step 3: gradient not finite, step skipped" in capsys.readouterr().err

    def changed(before, after):
        same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), poison.states[before], poison.states[after])
        return not all(jax.tree.leaves(same))

    assert not changed(5, 6) and not changed(6, 7), "moments, averages and parameters stay, to the bit"
    assert changed(1, 2) and changed(3, 4)

    stream = make_train_iterator(config, load_tokenizer(config.data.tokenizer))
    sample_ids = [next(stream).sample_ids for _ in range(7)]
    stream.close()
    skipped = [json.loads(line) for line in (tmp_path / SKIPPED_BATCHES).read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [3, 6, 7]
    assert all(entry["sample_ids"] == sample_ids[entry["step"] - 1] for entry in skipped)
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)][:6] == [0, 0, 1, 1, 1, 2]
    assert [line["batch_hash"] for line in read_metrics(tmp_path)][:6] == [line["batch_hash"] for line in usual[2]][:6]

    assert list_steps(tmp_path) == [4]
    state = run(config, tmp_path)
    assert int(state.step) == 8 and int(state.skipped) == 1 and int(state.consecutive_skips) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_a_loss_that_never_sees_a_target_is_an_error(tiny_experiment, tiny_world, tmp_path, monkeypatch):
    """Both sources hold questions only, so nothing is generated. The window is shortened to save the time."""
    monkeypatch.setattr(reporting, "MIN_TARGET_WINDOW", 4)
    config = tiny_experiment(data__sources__generation__path=tiny_world / "qa")
    with pytest.raises(ValueError, match=r"the visual loss of objective=semantic_input saw no target in the 4 steps"):
        run(config, tmp_path)
    assert [line["terms"]["visual"]["mean"] for line in read_metrics(tmp_path)] == ["NaN"] * 3, "no target is no zero"


def spread_by_pairs(embeddings, image_ids):
    """1 - mean cosine over pairs, as the definition says it."""
    values = []
    for image in set(image_ids.tolist()) - {0}:
        tokens = embeddings[image_ids == image]
        if len(tokens) > 1:
            unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
            cosines = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
            values.append(1 - np.mean(cosines))
    return sum(values), len(values)


def measured_spread(embeddings, image_ids):
    patch_ids = np.repeat(image_ids, 4, axis=1).astype(np.int32)
    total, count = within_image_spread(jnp.asarray(embeddings, jnp.float32), jnp.asarray(patch_ids))
    return float(total), float(count)


def collapsed_embeddings(noise):
    """Two images of 9 tokens that differ widely from each other, their own tokens by `noise` only; then padding."""
    rng = np.random.default_rng(0)
    image_ids = np.array([[1] * 9 + [2] * 9 + [0] * 6])
    centres = rng.standard_normal((3, 32))
    return centres[image_ids] + noise * rng.standard_normal((1, 24, 32)), image_ids


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0, 10.0])
def test_spread_is_that_of_pairs_within_images(noise):
    embeddings, image_ids = collapsed_embeddings(noise)
    expected = spread_by_pairs(embeddings[0], image_ids[0])
    np.testing.assert_allclose(measured_spread(embeddings, image_ids), expected, rtol=1e-4, atol=1e-5)
    assert expected[1] == 2
    assert measured_spread(embeddings, np.where(image_ids == 1, 1, 0))[1] == 1
    assert measured_spread(embeddings[:, :1], image_ids[:, :1])[1] == 0, "one token has no pair"


def test_alarms_begin_and_end(tiny_experiment, tmp_path, capsys):
    """Spread across images stays wide throughout: only what happens within an image may set the alarm off."""
    reporter = reporting.Reporter(tiny_experiment(), tmp_path, 0, {})

    def alarms_at(number, noise, copy=0.5):
        total, count = measured_spread(*collapsed_embeddings(noise))
        terms = {"within_spread": {"mean": total / count}, "copy_previous_cosine": {"mean": copy}}
        return reporter._update_alarms(number, terms), capsys.readouterr().err

    assert alarms_at(1, 1.0) == ([], "")
    raised, message = alarms_at(2, 0.0)
    assert raised == ["within_spread"] and "step 2: ALARM: within-image spread" in message
    assert alarms_at(3, 0.1) == (["within_spread"], ""), "said once"
    raised, message = alarms_at(4, 0.42)
    assert raised == ["within_spread_warn"], raised
    assert "warning: within-image spread" in message and "within_spread is over" in message
    raised, message = alarms_at(5, 1.0, copy=0.05)
    assert raised == ["copy_distance"] and "ALARM: copying the previous embedding" in message
    assert alarms_at(6, 1.0)[0] == []
    low = {"across_spread": {"mean": 0.03}}
    assert reporter._update_alarms(500, low) == [], "every run begins like that"
    assert reporter._update_alarms(501, low) == ["across_spread"]
    assert "ALARM: across-image spread 0.0300" in capsys.readouterr().err
    assert reporter._update_alarms(502, {"across_spread": {"mean": 0.2}}) == []
    # Any replicate that collapses counts; an interval without any image is no collapse.
    assert reporter._update_alarms(7, {"within_spread": {"mean": np.array([0.7, 0.01])}}) == ["within_spread"]
    assert reporter._update_alarms(8, {"within_spread": {"mean": np.nan}}) == []
    reporter.close()


@pytest.mark.slow
def test_an_interval_that_a_stop_cut_in_two_is_reported_whole(tiny_experiment, tmp_path):
    """Lines every 3 steps, saves every 2: the line of step 6 covers steps 4 to 6 though step 5 was computed twice."""
    config = tiny_experiment(train__log_every_steps=3)
    run(config, tmp_path / "unbroken")

    def crash(number, state):
        if number == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(config, tmp_path / "broken", [crash])
    assert list_steps(tmp_path / "broken")[-1] == 4
    run(config, tmp_path / "broken")
    lines, expected = (read_metrics(tmp_path / name) for name in ("broken", "unbroken"))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 8]
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "batch_hash", "terms", "text_by_source", "gradient_norm", "totals", "alarms"):
            assert line[name] == other[name], (line["step"], name)


def test_data_prepared_anew_at_the_same_path_is_refused(tiny_experiment, tiny_world, tmp_path):
    """Same configuration, other records: a resumed run would silently go on with another stream."""
    copied = tmp_path / "world"
    shutil.copytree(tiny_world, copied)
    paths = {"data__sources__qa__path": copied / "qa", "data__sources__generation__path": copied / "generation"}
    config = tiny_experiment(train__num_steps=2, data__tokenizer=copied / "tokenizer", **paths)
    run(config, tmp_path / "run")
    manifest = json.loads((copied / "qa" / "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.startswith("train-"))
    manifest["files"][name]["digest"] = "0" * 128
    (copied / "qa" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was trained on other data .*\n  - sources\.qa: "):
        run(tiny_experiment(train__num_steps=4, data__tokenizer=copied / "tokenizer", **paths), tmp_path / "run")
