"""`verify-claims`: a table of finished runs and a protocol in, verdicts out.

The table (`results.parquet` or `.csv`) has a row for each run and metric: `arm`, `seed`, `metric`, `value`. The metric
`collapsed` is 1 of a run whose alarms were on at its end. The protocol says what was fixed before the runs: the metric,
the margin, the contrasts, the seeds, and the planted controls. Every run that the table names counts.
"""

import csv
import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from unihetero_jax.verdicts import COLLAPSE_SHARE, POWER, Contrast, judge, seeds_needed, smallest_detectable

COLUMNS = ("arm", "seed", "metric", "value")
COLLAPSED = "collapsed"
CLAIMS = ("primary", "exploratory")
"""Roles of contrasts that are no planted controls."""

Table = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Metric -> arm -> seed -> value."""


Matching = Literal["none", "data", "flops", "parameters"]


@dataclasses.dataclass(frozen=True)
class Gate:
    """Bounds of an accuracy's share of the range from chance to 1."""

    metric: str
    chance: float
    low: float
    high: float


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
        exploratory: contrasts that are looked at without a claim: they have the whole level, and a label.
        matching: what all arms have in common, as `sweep` checks it before it trains anything.
        gate: where the better baseline has to lie, or the runs are too short or too long to show an effect.
    """

    metric: str
    margin: float
    contrasts: Mapping[str, tuple[str, tuple[str, ...]]]
    num_seeds: int
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    exploratory: tuple[str, ...] = ()
    matching: Matching = "none"
    gate: Gate | None = None


@dataclasses.dataclass(frozen=True)
class Registered:
    """A protocol, and what is known of its history.

    Attributes:
        protocol: what was fixed.
        about: file, digest, commit and date of its registration; empty of a protocol that was written by hand.
        voided: why it counts no longer; empty if it does.
    """

    protocol: Protocol
    about: Mapping[str, Any]
    voided: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """A contrast's verdict, and what stands beside it.

    Attributes:
        contrast: from `verdicts.judge`.
        arm, baseline: that were compared.
        collapsed: runs of the arm that collapsed, of all; None where the table does not say.
        collapsed_baseline: the same of the baseline.
        role: `primary`, `exploratory`, or the control `positive` or `negative`.
    """

    contrast: Contrast
    arm: str
    baseline: str
    collapsed: tuple[int, int] | None
    collapsed_baseline: tuple[int, int] | None
    role: str

    @property
    def verdict(self) -> str:
        """The rule's verdict, or the collapse where more than a fifth of the runs of either side had one."""
        for found, whose in ((self.collapsed, ""), (self.collapsed_baseline, "baseline ")):
            if found and found[0] > COLLAPSE_SHARE * found[1]:
                return f"{whose}collapsed in {found[0]} of {found[1]}"
        return self.contrast.verdict


def read_protocol(path: Path) -> Registered:
    """From JSON: as a sweep registered it, or written by hand.

    Raises:
        ValueError: a field is missing, unknown or of no sense; names file and field.
    """
    values = _json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a protocol is an object, not {type(values).__name__}")
    about, changed = values.pop("registered", {}), values.pop("changed", [])
    voided = f"{about.get('file')} changed after the first run ({', '.join(changed)})" if changed else ""
    return Registered(parse_protocol(values, str(path)), about, voided)


def without_protocol(table: Table) -> Registered:
    """For the results of a sweep that decides nothing: a metric to show, and no contrasts."""
    metric = min(table, key=lambda name: (not name.startswith(("answer_nll/", "held_out/")), name))
    num_seeds = max(len(values) for values in table[metric].values())
    return Registered(Protocol(metric=metric, margin=0.0, num_seeds=num_seeds, contrasts={}), {}, "")


def parse_protocol(values: Mapping[str, Any], path: str) -> Protocol:
    """From plain values; `path` says where they come from.

    Raises:
        ValueError: a field is missing, unknown or of no sense; names file and field.
    """
    names = {field.name for field in dataclasses.fields(Protocol)}
    required = {field.name for field in dataclasses.fields(Protocol) if field.default is dataclasses.MISSING}
    if set(values) - names or required - set(values):
        raise ValueError(
            f"{path}: fields {', '.join(sorted(required))} are needed, {', '.join(sorted(names - required))} may be "
            f"given; found {', '.join(values)}"
        )
    contrasts = {}
    for name, pair in values["contrasts"].items():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{path}: contrasts.{name}: give [arm, baseline] or [arm, [baseline, baseline]]")
        contrasts[name] = (pair[0], (pair[1],) if isinstance(pair[1], str) else tuple(pair[1]))
    roles = {name: tuple(values.get(name, ())) for name in ("positive", "negative", "exploratory")}
    for role, own in roles.items():
        for name in own:
            if name not in contrasts:
                raise ValueError(f"{path}: {role} {name!r} is none of the contrasts ({', '.join(contrasts)})")
            if sum(name in others for others in roles.values()) > 1:
                raise ValueError(f"{path}: {name!r} has two roles; leave it in one of {', '.join(roles)}")
    matching = values.get("matching", "none")
    if matching not in typing.get_args(Matching):
        raise ValueError(f"{path}: matching {matching!r}; there are {', '.join(typing.get_args(Matching))}")
    return Protocol(
        values["metric"], float(values["margin"]), contrasts, int(values["num_seeds"]), matching=matching,
        gate=_gate(values.get("gate"), path), **roles,
    )  # fmt: skip


def _gate(values: Any, path: str) -> Gate | None:
    if values is None:
        return None
    names = {field.name for field in dataclasses.fields(Gate)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"{path}: gate needs {', '.join(sorted(names))}")
    return Gate(**values)


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
    """A finding for each contrast, in the protocol's order. Those that are not primary have the whole level each.

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
    roles = {name: role for role in ("positive", "negative", "exploratory") for name in getattr(protocol, role)}
    primary = {name: own for name, own in differences.items() if name not in roles}
    judged = {one.name: one for one in judge(primary, protocol.margin)} if primary else {}
    for name in roles:
        judged[name] = judge({name: differences[name]}, protocol.margin)[0]
    found = []
    for name, (arm, baseline) in pairs.items():
        of_arm, of_baseline = (collapsed_runs(table, one) for one in (arm, baseline))
        found.append(Finding(judged[name], arm, baseline, of_arm, of_baseline, roles.get(name, "primary")))
    return found


def collapsed_runs(table: Table, arm: str) -> tuple[int, int] | None:
    """How many of an arm's runs collapsed, of how many; None where the table does not say."""
    flags = table.get(COLLAPSED, {}).get(arm)
    return (sum(value > 0 for value in flags.values()), len(flags)) if flags else None


def why_withheld(findings: Sequence[Finding], registered: Registered, gate: str = "") -> list[str]:
    """Why no verdict is given: the protocol is void, the gate was missed, or a planted control came out wrong, so that
    the instrument cannot be believed.
    """
    return [reason for reason in (registered.voided, gate) if reason] + [
        f"{one.contrast.name} ({one.role} control) is {one.verdict}; the instrument does not find what was planted"
        for one in findings
        if (one.role == "positive" and one.contrast.verdict != "supported")
        or (one.role == "negative" and one.contrast.verdict == "supported")
    ]


def missed_gate(table: Table, findings: Sequence[Finding], gate: Gate | None) -> str:
    """Where the better baseline lies if that is outside of the gate; empty if it is inside, or there is none.

    Raises:
        ValueError: the table lacks the gate's metric.
    """
    if gate is None:
        return ""
    if gate.metric not in table:
        raise ValueError(f"the results have no metric {gate.metric}, which the gate needs")
    own, treated = table[gate.metric], {one.arm for one in findings}
    baselines = {one.baseline for one in findings if one.role == "primary"} - treated
    if not baselines & own.keys():
        raise ValueError(
            f"the gate needs {gate.metric} of a baseline ({', '.join(sorted(baselines)) or 'there is none'})"
        )
    best = max(np.mean(list(own[name].values())) for name in baselines & own.keys())
    share = (best - gate.chance) / (1 - gate.chance)
    if gate.low <= share <= gate.high:
        return ""
    return f"the baseline is at {share:.2f} of the range of {gate.metric}, not from {gate.low} to {gate.high}"


@dataclasses.dataclass(frozen=True)
class Pilot:
    """What runs of the baselines alone say of the noise.

    Attributes:
        num_seeds: of each baseline.
        spread: standard deviation of the paired difference of two baselines.
        unpaired: the same if their seeds were drawn apart.
        correlation: of two baselines over seeds; pairing helps where it is positive.
    """

    num_seeds: int
    spread: float
    unpaired: float
    correlation: float


def read_pilot(table: Table, protocol: Protocol) -> Pilot:
    """From a table that has the first two baselines of the protocol with the same seeds.

    Raises:
        ValueError: there is one baseline alone, or the table lacks it, or fewer than three seeds of both.
    """
    baselines = next((list(names[:2]) for _, names in protocol.contrasts.values() if len(names) > 1), [])
    values = table.get(protocol.metric, {})
    if len(baselines) < 2 or not set(baselines) <= set(values):
        named = ", ".join(baselines) or "none has two"
        raise ValueError(
            f"a pilot needs {protocol.metric} of the two baselines of a contrast ({named}); there are "
            f"{', '.join(sorted(values)) or 'none'}"
        )
    seeds = sorted(set(values[baselines[0]]) & set(values[baselines[1]]))
    if len(seeds) < 3:
        raise ValueError(f"a pilot needs at least three seeds of {' and '.join(baselines)}, not {len(seeds)}")
    first, second = (np.array([values[name][seed] for seed in seeds]) for name in baselines)
    if not (first - second).std(ddof=1) > 0:
        raise ValueError(f"the pilot's {protocol.metric} of {' and '.join(baselines)} differ equally in all seeds; "
                         "a spread of 0 says nothing, give it runs of different seeds")  # fmt: skip
    unpaired = math.sqrt(first.var(ddof=1) + second.var(ddof=1))
    return Pilot(len(seeds), float((first - second).std(ddof=1)), unpaired, float(np.corrcoef(first, second)[0, 1]))


def format_pilot(pilot: Pilot, protocol: Protocol) -> str:
    """What can be seen with the planned seeds, and how many the margin needs."""
    num_primary = len(protocol.contrasts) - len({*protocol.positive, *protocol.negative, *protocol.exploratory})
    least = smallest_detectable(pilot.spread, max(protocol.num_seeds, 2), max(num_primary, 1))
    needed = seeds_needed(pilot.spread, protocol.margin, max(num_primary, 1))
    return (
        f"pilot of {pilot.num_seeds} seeds: {protocol.metric} of paired runs differs by a spread of {pilot.spread:.4f} "
        f"({pilot.unpaired:.4f} unpaired, correlation {pilot.correlation:.2f})\n"
        f"smallest detectable difference with {max(protocol.num_seeds, 2)} seeds and {num_primary} primary contrasts: "
        f"{least:.4f} (told from 0 with power {POWER:g}; to be called supported, the estimate also has to reach the "
        f"margin); a margin of {protocol.margin:g} needs {needed} seeds"
    )


def format_findings(findings: Sequence[Finding], registered: Registered, gate: str = "") -> str:
    """What the command prints; `gate` says that it was missed."""
    protocol = registered.protocol
    lines = [
        f"{protocol.metric}, baseline less arm; margin {protocol.margin:g}; planned seeds {protocol.num_seeds}",
        f"{'contrast':<44}{'estimate':>10}{'interval':>22}{'seeds':>7}  verdict",
    ]
    withheld = why_withheld(findings, registered, gate)
    for one in findings:
        own, verdict = one.contrast, shown_verdict(one, protocol, bool(withheld))
        label = own.name if one.role in CLAIMS else f"{own.name} [{one.role} control]"
        interval = f"{own.low:.4f} to {own.high:.4f}"
        lines.append(f"{label:<44}{own.estimate:>10.4f}{interval:>22}{own.num_seeds:>7}  {verdict}")
    return "\n".join([*lines, *(f"WITHHELD: {reason}" for reason in withheld)])


def shown_verdict(one: Finding, protocol: Protocol, is_withheld: bool) -> str:
    """The verdict with what has to be said beside it."""
    own = one.contrast
    verdict = "withheld" if is_withheld and one.role in CLAIMS else one.verdict
    if own.is_exploratory or one.role == "exploratory":
        verdict += " (exploratory)"
    elif own.num_seeds != protocol.num_seeds:
        verdict += f" ({own.num_seeds} seeds, {protocol.num_seeds} were planned)"
    if own.seeds_to_decide and verdict.startswith("inconclusive"):
        verdict += f"; {own.seeds_to_decide} seeds would decide"
    return verdict


def to_json(findings: Sequence[Finding], registered: Registered, gate: str = "") -> dict[str, Any]:
    """Everything that was printed, for files."""
    withheld = why_withheld(findings, registered, gate)
    rows = [
        {"arm": one.arm, "baseline": one.baseline, "role": one.role, "collapsed": one.collapsed,
         "collapsed_baseline": one.collapsed_baseline,
         "verdict": "withheld" if withheld and one.role in CLAIMS else one.verdict,
         **{name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(one.contrast).items() if name != "verdict"}}
        for one in findings
    ]  # fmt: skip
    protocol = dataclasses.asdict(registered.protocol)
    return {"protocol": protocol, "registered": dict(registered.about), "findings": rows, "withheld": withheld}
