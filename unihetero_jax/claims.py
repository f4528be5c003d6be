"""`verify-claims`: a table of finished runs and a protocol in, verdicts out.

The table (`results.parquet` or `.csv`) has a row for each run and metric: `arm`, `seed`, `metric`, `value`. The metric
`collapsed` is 1 of a run whose alarms were on at its end. The protocol says what was fixed before the runs: the metric,
the margin, the contrasts, the seeds, and the planted controls. Every run that the table names counts.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from unihetero_jax.verdicts import COLLAPSE_SHARE, Contrast, judge

COLUMNS = ("arm", "seed", "metric", "value")
COLLAPSED = "collapsed"

Table = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Metric -> arm -> seed -> value."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is fixed before the runs.

    Attributes:
        metric: of the table; the lower the better (a negative log-likelihood).
        margin: m, in its units.
        contrasts: name -> (arm, baselines); of several baselines the one with the better mean counts.
        num_seeds: planned for every arm.
        positive: contrasts among them whose effect was planted: they must be supported.
        negative: contrasts of planted nothing: they must not be supported.
    """

    metric: str
    margin: float
    contrasts: Mapping[str, tuple[str, tuple[str, ...]]]
    num_seeds: int
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """A contrast's verdict, and what stands beside it.

    Attributes:
        contrast: from `verdicts.judge`.
        arm, baseline: that were compared.
        collapsed: runs of the arm that collapsed, of all.
        role: `primary`, `positive` or `negative` control.
    """

    contrast: Contrast
    arm: str
    baseline: str
    collapsed: tuple[int, int]
    role: str

    @property
    def verdict(self) -> str:
        """The rule's verdict, or the collapse where more than a fifth of the runs had one."""
        bad, number = self.collapsed
        return f"collapsed in {bad} of {number}" if bad > COLLAPSE_SHARE * number else self.contrast.verdict


def read_protocol(path: Path) -> Protocol:
    """From JSON.

    Raises:
        ValueError: a field is missing, unknown or of no sense; names file and field.
    """
    values = _json(path)
    names = {field.name for field in dataclasses.fields(Protocol)}
    required = {field.name for field in dataclasses.fields(Protocol) if field.default is dataclasses.MISSING}
    if not isinstance(values, dict) or set(values) - names or required - set(values):
        raise ValueError(
            f"{path}: fields {', '.join(sorted(required))} are needed, {', '.join(sorted(names - required))} may be "
            f"given; found {', '.join(values) if isinstance(values, dict) else type(values).__name__}"
        )
    contrasts = {}
    for name, pair in values["contrasts"].items():
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{path}: contrasts.{name}: give [arm, baseline] or [arm, [baseline, baseline]]")
        contrasts[name] = (pair[0], (pair[1],) if isinstance(pair[1], str) else tuple(pair[1]))
    controls = {name: tuple(values.get(name, ())) for name in ("positive", "negative")}
    for name in (*controls["positive"], *controls["negative"]):
        if name not in contrasts:
            raise ValueError(f"{path}: control {name!r} is none of the contrasts ({', '.join(contrasts)})")
    return Protocol(values["metric"], float(values["margin"]), contrasts, int(values["num_seeds"]), **controls)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no protocol ({error}); verify-claims takes --protocol=FILE") from error


def read_table(path: Path) -> Table:
    """From Parquet or CSV.

    Raises:
        ValueError: a column is missing, a value is no number, or a run has a metric twice; names file and row.
    """
    if not path.is_file():
        raise ValueError(f"--results {path}: no such file")
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    table: dict[str, dict[str, dict[int, float]]] = {}
    for number, row in enumerate(rows):
        missing = [name for name in COLUMNS if row.get(name) in (None, "")]
        if missing:
            raise ValueError(f"{path}: row {number}: no {', '.join(missing)}")
        try:
            seed, value = int(row["seed"]), float(row["value"])
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        of_arm = table.setdefault(row["metric"], {}).setdefault(row["arm"], {})
        if seed in of_arm:
            raise ValueError(f"{path}: row {number}: {row['arm']}, seed {seed} has {row['metric']} twice")
        of_arm[seed] = value
    return table


def verify(table: Table, protocol: Protocol) -> list[Finding]:
    """A finding for each contrast, in the protocol's order. A control is no primary contrast: it has the whole level.

    Raises:
        ValueError: the table lacks the metric, an arm, or seeds that an arm has and its baseline has not.
    """
    if protocol.metric not in table:
        raise ValueError(f"the results have no metric {protocol.metric}; they have {', '.join(sorted(table))}")
    values, pairs = table[protocol.metric], {}
    for name, (arm, baselines) in protocol.contrasts.items():
        absent = [one for one in (arm, *baselines) if one not in values]
        if absent:
            raise ValueError(f"contrast {name}: no runs of {', '.join(absent)}; there are {', '.join(sorted(values))}")
        baseline = min(baselines, key=lambda one: np.mean(list(values[one].values())))
        unpaired = sorted(set(values[arm]) ^ set(values[baseline]))
        if unpaired:
            raise ValueError(
                f"contrast {name}: seeds {unpaired} have one of {arm} and {baseline} alone; run the others"
            )
        pairs[name] = (arm, baseline)
    differences = {
        name: [values[baseline][seed] - values[arm][seed] for seed in sorted(values[arm])]
        for name, (arm, baseline) in pairs.items()
    }
    controls = dict.fromkeys(protocol.positive, "positive") | dict.fromkeys(protocol.negative, "negative")
    primary = {name: own for name, own in differences.items() if name not in controls}
    judged = {one.name: one for one in judge(primary, protocol.margin)} if primary else {}
    for name in controls:
        judged[name] = judge({name: differences[name]}, protocol.margin)[0]
    found = []
    for name, (arm, baseline) in pairs.items():
        flags = table.get(COLLAPSED, {}).get(arm, {})
        collapsed = sum(value > 0 for value in flags.values()), len(values[arm])
        found.append(Finding(judged[name], arm, baseline, collapsed, controls.get(name, "primary")))
    return found


def wrong_controls(findings: Sequence[Finding]) -> list[str]:
    """Planted controls that came out wrong: then the instrument cannot be believed, and no verdict is given."""
    return [
        f"{one.contrast.name} ({one.role} control) is {one.verdict}"
        for one in findings
        if (one.role == "positive" and one.contrast.verdict != "supported")
        or (one.role == "negative" and one.contrast.verdict == "supported")
    ]


def format_findings(findings: Sequence[Finding], protocol: Protocol) -> str:
    """What the command prints."""
    lines = [
        f"{protocol.metric}, baseline less arm; margin {protocol.margin:g}; planned seeds {protocol.num_seeds}",
        f"{'contrast':<44}{'estimate':>10}{'interval':>22}{'seeds':>7}  verdict",
    ]
    wrong = wrong_controls(findings)
    for one in findings:
        own = one.contrast
        verdict = "withheld" if wrong and one.role == "primary" else one.verdict
        if own.is_exploratory:
            verdict += " (exploratory)"
        elif own.num_seeds < protocol.num_seeds:
            verdict += f" ({own.num_seeds} of {protocol.num_seeds} planned seeds)"
        if own.seeds_to_decide and verdict.startswith("inconclusive"):
            verdict += f"; {own.seeds_to_decide} seeds would decide"
        label = own.name if one.role == "primary" else f"{own.name} [{one.role} control]"
        interval = f"{own.low:.4f} to {own.high:.4f}"
        lines.append(f"{label:<44}{own.estimate:>10.4f}{interval:>22}{own.num_seeds:>7}  {verdict}")
    lines += [f"WITHHELD: {fault}; the instrument does not find what was planted" for fault in wrong]
    return "\n".join(lines)


def to_json(findings: Sequence[Finding], protocol: Protocol) -> dict[str, Any]:
    """Everything that was printed, for files."""
    wrong = wrong_controls(findings)
    rows = [
        {"arm": one.arm, "baseline": one.baseline, "role": one.role, "collapsed": list(one.collapsed),
         "verdict": "withheld" if wrong and one.role == "primary" else one.verdict,
         **{name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(one.contrast).items() if name != "verdict"}}
        for one in findings
    ]  # fmt: skip
    return {"protocol": dataclasses.asdict(protocol), "findings": rows, "wrong_controls": wrong}
