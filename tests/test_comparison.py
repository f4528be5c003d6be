"""When two runs are told apart: exact figures by hand, and how often by chance."""

import json
import math

import numpy as np
import pytest
from conftest import make_tiny_config

from unihetero_jax.cli import main
from unihetero_jax.config import to_dict
from unihetero_jax.evaluation import comparison
from unihetero_jax.evaluation.comparison import compare_hits, compare_runs, unlike_settings


def hits(only_a, only_b, both, neither):
    a = [1] * only_a + [0] * only_b + [1] * both + [0] * neither
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * neither
    return a, b, [str(i) for i in range(len(a))]


def test_the_exact_test_by_hand():
    """Of 12 items on which they differ B has 10: the chance of that or more extreme is 2 (66 + 12 + 1) / 2^12."""
    row = compare_hits("set", "overall", *hits(2, 10, 40, 48))
    assert row.p_value == pytest.approx(2 * (66 + 12 + 1) / 2**12) and (row.only_a, row.only_b) == (2, 10)
    assert (row.accuracy_a, row.accuracy_b, row.difference) == pytest.approx((0.42, 0.50, 0.08))
    error = math.sqrt((12 - 100 * 0.08**2) / 100**2)
    assert (row.low, row.high) == pytest.approx((0.08 - 1.96 * error, 0.08 + 1.96 * error), abs=0.011)
    assert row.verdict == "better"
    assert compare_hits("set", "overall", *hits(10, 2, 40, 48)).verdict == "worse"
    assert row.items_needed == math.ceil(100 * ((1.959964 + 0.841621) * error / 0.08) ** 2)


def test_the_exact_test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for pair in ((0, 0), (1, 0), (3, 3), (5, 17), (40, 22), (900, 1100)):
        expected = stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1.0
        assert comparison.mcnemar(*pair) == pytest.approx(expected, rel=1e-9)


def test_both_tests_have_to_agree():
    """Five items that only B has right: few draws of the bootstrap miss them all, but five coins fall so at 1/16."""
    row = compare_hits("set", "overall", *hits(0, 5, 50, 45))
    assert row.low > 0 and row.p_value == pytest.approx(2 / 2**5) and row.verdict == "not distinguishable"


def test_shares_are_told_apart_too():
    """Accuracies of open answers lie between: .3 against .9 on 200 items."""
    assert compare_hits("set", "overall", [0.3] * 200, [0.9] * 200, [str(i) for i in range(200)]).verdict == "better"


def test_equal_runs_are_not_told_apart():
    row = compare_hits("set", "overall", *hits(0, 0, 5, 5))
    assert (row.difference, row.low, row.high, row.p_value) == (0, 0, 0, 1.0)
    assert row.verdict == "not distinguishable" and row.items_needed is None


def test_a_difference_on_few_pictures_is_no_difference():
    """Thirty questions on each of three pictures: the items say yes, the pictures say three."""
    a, b, _ = hits(0, 30, 30, 30)
    assert compare_hits("set", "overall", a, b, [str(i) for i in range(90)]).verdict == "better"
    clustered = compare_hits("set", "overall", a, b, [str(i // 30) for i in range(90)])
    assert clustered.num_clusters == 3 and clustered.p_value < 1e-6
    assert clustered.verdict == "not distinguishable"


def test_chance_alone_rarely_tells_runs_apart(monkeypatch):
    """400 pairs of equally good runs, three questions a picture that share much of their difficulty."""
    monkeypatch.setattr(comparison, "NUM_DRAWS", 1000)
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(80), 3).astype(str).tolist()
    told = 0
    for _ in range(400):
        a, b = ((rng.random((80, 3)) < rng.beta(0.4, 0.4, (80, 1))).astype(int).ravel() for _ in range(2))
        told += compare_hits("set", "overall", a, b, clusters).verdict != "not distinguishable"
    assert told / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_with_the_items_needed_a_difference_is_mostly_found(monkeypatch):
    monkeypatch.setattr(comparison, "NUM_DRAWS", 200)
    monkeypatch.setattr(comparison, "_DRAWS_AT_ONCE", 200)
    rng = np.random.default_rng(2)
    first = compare_hits("set", "overall", *hits(30, 40, 200, 130))
    needed, found = first.items_needed, 0
    for _ in range(60):
        kinds = rng.choice(4, needed, p=np.array([30, 40, 200, 130]) / 400)
        a, b = np.isin(kinds, (0, 2)).astype(int), np.isin(kinds, (1, 2)).astype(int)
        found += compare_hits("set", "overall", a, b, [str(i) for i in range(needed)]).verdict == "better"
    assert 0.6 < found / 60 < 0.95, "a power of .8, within what 60 draws can tell"


def write_result(folder, step, items, **changes):
    """A result file with the fields that a comparison reads."""
    result = {
        "benchmark": "set", "step": step, "mode": "likelihood", "data_hash": "d", "scorer": "s", "prompt_template": "p",
        "image_transform": {}, "items": items, "replicate": 0, "categories": {i: f"type {int(i) % 2}" for i in items},
        "clusters": {i: i for i in items},
    } | changes  # fmt: skip
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "eval" / f"set-{step}.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path):
    """a: step 1 all wrong, step 2 every other item right; b: all right."""
    indices = [str(i) for i in range(60)]
    write_result(tmp_path / "a", 1, dict.fromkeys(indices, 0))
    write_result(tmp_path / "a", 2, {i: int(i) % 4 // 2 for i in indices})
    write_result(tmp_path / "b", 7, dict.fromkeys(indices, 1))
    (tmp_path / "b" / "eval" / "rollout-7.json").write_text('{"retrieval": 1.0}')
    return tmp_path


def test_runs_and_steps_are_compared_by_category_and_whole(runs, capsys):
    rows = compare_runs(str(runs / "a"), str(runs / "b"))
    assert [(row.category, row.num_items, row.accuracy_a, row.verdict) for row in rows] == [
        ("type 0", 30, 0.5, "better"), ("type 1", 30, 0.5, "better"), ("overall", 60, 0.5, "better"),
    ]  # fmt: skip
    (steps,) = [row for row in compare_runs(f"{runs}/a@2", f"{runs}/a@1") if row.category == "overall"]
    assert steps.verdict == "worse" and steps.accuracy_b == 0.0
    out = runs / "out.json"
    assert main(["compare", str(runs / "a"), str(runs / "b"), f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    assert "better" in printed and "McNemar" in printed
    assert len(json.loads(out.read_text())["differences"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_hash": "other"}, r"set: the two results differ in data_hash \(d and other\)"),
        ({"prompt_template": "other"}, "differ in prompt_template"),
        ({"items": {"0": 1}, "categories": {"0": "x"}, "clusters": {"0": "0"}}, "are of other items"),
        ({"benchmark": "else"}, "has results of set, .*of else: none in common"),
        ({"mode": "letters"}, "no results of mode likelihood"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, changes, message):
    write_result(runs / "b", 7, changes.pop("items", {str(i): 1 for i in range(60)}), **changes)
    with pytest.raises(ValueError, match=message):
        compare_runs(str(runs / "a"), str(runs / "b"))


def test_a_run_without_results_is_named(runs, capsys):
    assert main(["compare", str(runs / "a@9"), str(runs / "b")]) == 2
    assert "a: no results of mode likelihood of step 9" in capsys.readouterr().err


def test_what_else_differs_is_said(runs, capsys):
    """Equal targets, lambda and head; a run without a visual loss has none of them to be equal."""
    plain = to_dict(make_tiny_config())
    assert unlike_settings(plain, plain | {"objective": "semantic_encoder"}) == []
    weaker = to_dict(make_tiny_config(objective="patch", loss__visual_weight=0.1, model__semantic_head__hidden_dim=8))
    assert unlike_settings(plain, weaker) == [
        "loss.visual_weight: 1.0 -> 0.1", "model.semantic_head.hidden_dim: 32 -> 8"
    ]  # fmt: skip
    assert unlike_settings(plain, weaker | {"objective": "understanding"}) == []
    longer = to_dict(make_tiny_config(objective="understanding", train__num_steps=11, data__num_threads=9))
    assert unlike_settings(plain, longer) == ["train.num_steps: 10 -> 11"]
    for name, values in (("a", plain), ("b", weaker)):
        (runs / name / "config.json").write_text(json.dumps(values))
    assert main(["compare", str(runs / "a"), str(runs / "b"), f"--output={runs / 'out.json'}"]) == 0
    assert "NOT LIKE FOR LIKE" in capsys.readouterr().out
    assert len(json.loads((runs / "out.json").read_text())["unlike"]) == 2
