"""`verify-claims` on stored tables: planted effects get their verdicts, and nothing is left out in silence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unihetero_jax import claims
from unihetero_jax.cli import main

MARGIN, SEEDS = 0.02, 16
EFFECTS = {"helps": 0.05, "nothing": 0.0, "harms": -0.05, "revealed": 0.2, "shuffled": -0.01}


def rows(effects=EFFECTS, num_seeds=SEEDS, spread=0.01, collapsed=()):
    """Runs of two baselines, of which the second is better, and of arms that lie below it by their effect."""
    rng = np.random.default_rng(0)
    level = rng.normal(0.7, 0.05, num_seeds)  # what a seed's runs share
    made = {"understanding": level + 0.1, "understanding_i2t": level}
    made |= {arm: level - effect + rng.normal(0, spread, num_seeds) for arm, effect in effects.items()}
    found = [
        {"arm": arm, "seed": seed, "metric": "answer_nll", "value": float(value)}
        for arm, values in made.items()
        for seed, value in enumerate(values)
    ]
    flags = [{"arm": arm, "seed": seed, "metric": "collapsed", "value": float(arm in collapsed)}
             for arm in made for seed in range(num_seeds)]  # fmt: skip
    return found + flags


def protocol(**changes):
    contrasts = {arm: [arm, ["understanding", "understanding_i2t"]] for arm in EFFECTS}
    return {"metric": "answer_nll", "margin": MARGIN, "num_seeds": SEEDS, "contrasts": contrasts,
            "positive": ["revealed"], "negative": ["shuffled"]} | changes  # fmt: skip


def write(folder, table, plan=None):
    pq.write_table(pa.Table.from_pylist(table), folder / "results.parquet")
    (folder / "protocol.json").write_text(json.dumps(plan or protocol()))
    return ["verify-claims", f"--results={folder / 'results.parquet'}"]


def test_planted_effects_get_three_verdicts(tmp_path, capsys):
    noisy = rows({"helps": 0.05, "nothing": 0.0, "unclear": 0.01, "revealed": 0.2, "shuffled": -0.01}, spread=0.01)
    wide = np.random.default_rng(1).normal(0.02, 0.15, SEEDS)
    for row in noisy:
        if row["arm"] == "unclear" and row["metric"] == "answer_nll":
            row["value"] -= wide[row["seed"]]
    contrasts = {arm: [arm, "understanding_i2t"] for arm in ("helps", "nothing", "unclear", "revealed", "shuffled")}
    command = write(tmp_path, noisy, protocol(contrasts=contrasts))
    assert main([*command, f"--output={tmp_path / 'out.json'}"]) == 0
    found = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["findings"]}
    assert found["helps"]["verdict"] == "supported" and found["nothing"]["verdict"] == "not supported"
    assert found["unclear"]["verdict"] == "inconclusive" and found["unclear"]["seeds_to_decide"] > SEEDS
    printed = capsys.readouterr().out
    assert "seeds would decide" in printed and "[positive control]" in printed and "WITHHELD" not in printed


def test_the_better_baseline_counts(tmp_path):
    table = claims.read_table(_file(tmp_path, rows()))
    found = {one.contrast.name: one for one in claims.verify(table, _protocol(tmp_path))}
    assert {one.baseline for one in found.values()} == {"understanding_i2t"}
    assert found["nothing"].contrast.estimate == pytest.approx(0, abs=0.01), "against the worse one it would be 0.1"
    assert found["harms"].verdict == "not supported"


def _file(folder, table):
    write(folder, table)
    return folder / "results.parquet"


def _protocol(folder):
    return claims.read_protocol(folder / "protocol.json").protocol


def test_a_control_that_comes_out_wrong_withholds_the_verdicts(tmp_path, capsys):
    assert main(write(tmp_path, rows(EFFECTS | {"revealed": 0.0}))) == 1
    printed = capsys.readouterr().out
    assert "WITHHELD: revealed (positive control) is not supported" in printed
    assert printed.count("withheld") == 3, "of all primary contrasts"
    assert main(write(tmp_path, rows(EFFECTS | {"shuffled": 0.1}))) == 1
    assert "shuffled (negative control) is supported" in capsys.readouterr().out


def test_a_baseline_outside_of_the_gate_withholds_them_too(tmp_path, capsys):
    gate = {"metric": "accuracy", "chance": 0.25, "low": 0.4, "high": 0.7}
    for accuracy, code in ((0.9, 1), (0.7, 0), (0.3, 1)):
        flags = [{"arm": arm, "seed": 0, "metric": "accuracy", "value": accuracy - (arm == "understanding") / 10}
                 for arm in ("understanding", "understanding_i2t")]  # fmt: skip
        assert main(write(tmp_path, rows() + flags, protocol(gate=gate))) == code
        printed = capsys.readouterr().out
        assert ("of the range of accuracy, not from 0.4 to 0.7" in printed) == bool(code)
    assert "WITHHELD: the baseline is at 0.07" in printed, "of the one that counts"
    assert main(write(tmp_path, rows(), protocol(gate={"metric": "accuracy"}))) == 2
    assert "gate needs chance, high, low, metric" in capsys.readouterr().err


def test_what_is_looked_at_without_a_claim_costs_the_others_no_level(tmp_path):
    few = protocol(exploratory=["harms", "nothing"])
    table = claims.read_table(_file(tmp_path, rows()))
    write(tmp_path, rows(), few)
    found = {one.contrast.name: one for one in claims.verify(table, _protocol(tmp_path))}
    assert found["helps"].role == "primary" and found["helps"].contrast.level == 0.05
    assert found["harms"].role == "exploratory"
    assert "supported (exploratory)" in claims.format_findings(
        list(found.values()), claims.read_protocol(tmp_path / "protocol.json")
    )


def test_a_pilot_says_what_can_be_seen(tmp_path):
    """Baselines that share a level by seed: the paired spread is that of what they do not share."""
    table = claims.read_table(_file(tmp_path, rows()))
    values = table["answer_nll"]
    shifted = {seed: value + 0.01 * (-1) ** seed for seed, value in values["understanding"].items()}
    pilot = claims.read_pilot({"answer_nll": {**values, "understanding": shifted}}, _protocol(tmp_path))
    assert pilot.num_seeds == SEEDS and pilot.spread == pytest.approx(0.01 * np.sqrt(SEEDS / (SEEDS - 1)))
    assert pilot.correlation > 0.9 and pilot.unpaired > 3 * pilot.spread
    text = claims.format_pilot(pilot, _protocol(tmp_path))
    assert "16 seeds and 3 primary contrasts" in text and "a margin of 0.02 needs" in text
    with pytest.raises(ValueError, match="at least three seeds of understanding and understanding_i2t, not 2"):
        claims.read_pilot({"answer_nll": {name: {0: 1.0, 1: 2.0} for name in values}}, _protocol(tmp_path))
    with pytest.raises(ValueError, match="of the two baselines of a contrast"):
        claims.read_pilot({"answer_nll": {"understanding": {0: 1.0}}}, _protocol(tmp_path))


def test_a_collapsed_arm_is_labelled_and_counts(tmp_path):
    table = claims.read_table(_file(tmp_path, rows(collapsed=("helps",))))
    found = {one.contrast.name: one for one in claims.verify(table, _protocol(tmp_path))}
    assert found["helps"].verdict == "collapsed in 16 of 16" and found["helps"].contrast.num_seeds == 16


def test_a_collapsed_baseline_is_labelled_too_and_what_is_not_measured_is_not_zero(tmp_path):
    table = claims.read_table(_file(tmp_path, rows(collapsed=("understanding_i2t",))))
    found = {one.contrast.name: one for one in claims.verify(table, _protocol(tmp_path))}
    assert found["helps"].verdict == "baseline collapsed in 16 of 16" and found["helps"].collapsed == (0, 16)
    unsaid = {name: values for name, values in table.items() if name != "collapsed"}
    assert {one.collapsed for one in claims.verify(unsaid, _protocol(tmp_path))} == {None}


def test_a_contrast_has_one_role(tmp_path, capsys):
    assert main(write(tmp_path, rows(), protocol(exploratory=["revealed"]))) == 2
    assert "'revealed' has two roles; leave it in one of positive, negative, exploratory" in capsys.readouterr().err


def test_the_gate_looks_at_baselines_and_no_treated_arm(tmp_path, capsys):
    """An arm that is another's baseline does not open the gate."""
    gate = {"metric": "accuracy", "chance": 0.25, "low": 0.4, "high": 0.7}
    contrasts = {"helps": ["helps", "understanding_i2t"], "more": ["nothing", "helps"]}
    flags = [{"arm": arm, "seed": 0, "metric": "accuracy", "value": value}
             for arm, value in (("understanding_i2t", 0.3), ("helps", 0.7))]  # fmt: skip
    plan = protocol(gate=gate, contrasts=contrasts, positive=[], negative=[])
    assert main(write(tmp_path, rows() + flags, plan)) == 1
    assert "the baseline is at 0.07" in capsys.readouterr().out
    assert main(write(tmp_path, rows() + flags[1:], plan)) == 2
    assert "the gate needs accuracy of a baseline (understanding_i2t)" in capsys.readouterr().err


def test_few_seeds_are_exploratory_and_missing_ones_are_named(tmp_path, capsys):
    assert main(write(tmp_path, rows(num_seeds=4))) == 0
    assert "(exploratory)" in capsys.readouterr().out
    short = [row for row in rows() if not (row["arm"] == "helps" and row["seed"] in (3, 5))]
    assert main(write(tmp_path, short)) == 2
    assert "contrast helps: seeds [3, 5] have one of helps and understanding_i2t alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("arm,seed,metric\na,0,x\n", "row 0: no value"),
     ("arm,seed,metric,value\na,0,x,many\n", "row 0: could not convert"),
     ("arm,seed,metric,value\na,0,x,1\na,0,x,2\n", "row 1: a, seed 0 has x twice")],
)  # fmt: skip
def test_tables_that_cannot_be_read_name_their_row(tmp_path, content, message):
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        claims.read_table(tmp_path / "results.csv")


def test_protocols_that_cannot_be_read_name_their_field(tmp_path, capsys):
    command = write(tmp_path, rows(), {"metric": "answer_nll"})
    assert main(command) == 2 and "contrasts, margin, metric, num_seeds are needed" in capsys.readouterr().err
    assert main(write(tmp_path, rows(), protocol(positive=["typo"]))) == 2
    assert "positive 'typo' is none of the contrasts" in capsys.readouterr().err
    assert main(write(tmp_path, rows(), protocol(metric="nll"))) == 2
    assert "the results have no metric nll; they have answer_nll, collapsed" in capsys.readouterr().err
    (tmp_path / "protocol.json").unlink()
    assert main(command) == 2 and "no protocol" in capsys.readouterr().err
    assert main(["verify-claims", "--results=nowhere.parquet"]) == 2
