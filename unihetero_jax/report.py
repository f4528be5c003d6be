"""`report`: what a sweep found, as one page that needs nothing else.

Verdicts with their intervals, every arm's figures with every seed, curves over data where arms are written NAME@SIZE,
the runs, and how to read it all. Nothing is left out: an arm that collapsed, a control that came out wrong and a
verdict that is withheld stand where the reader looks first.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import special

from unihetero_jax import failure_signatures, scaling
from unihetero_jax.claims import (
    CLAIMS,
    COLLAPSED,
    Finding,
    Registered,
    Table,
    collapsed_runs,
    shown_verdict,
    why_withheld,
)
from unihetero_jax.failure_signatures import Signature, not_measured, signatures_table
from unihetero_jax.figures import image_of, new_figure
from unihetero_jax.html_page import definitions, escaped, page, section, table

SIZE_MARK = "@"
"""Between an arm and the number of pairs that it saw: `semantic_input@4096`."""
BUDGET = re.compile(r"(.+)@(\d+)GFLOP-.+")
"""An arm of one model size at one training budget: `semantic_input@1000GFLOP-d96`."""
SHOWN_FIRST = ("answer_nll", "answer_nll_gain", "accuracy", "rollout_error", "rollout_retrieval", "leak")
"""Metrics that stand in the table of arms, in this order; a metric's benchmark follows a slash."""
_COLORS = {"supported": "#2e7d32", "not supported": "#9aa1ad", "inconclusive": "#c77700"}
_OTHER_COLOR, _WITHHELD = "#b3261e", "#c9ced6"


def render(
    results: Table,
    registered: Registered,
    findings: Sequence[Finding],
    gate: str,
    title: str,
    unjudged: str = "",
    training: str = "",
) -> str:
    """The page.

    Args:
        results: metric -> arm -> seed -> value.
        registered: the protocol and its history.
        findings: from `claims.verify`.
        gate: from `claims.missed_gate`.
        title: what the page is called.
        unjudged: why there are no findings.
        training: HTML of what the runs logged while they trained, from `run_report.curves_of_sweep`.
    """
    withheld = why_withheld(findings, registered, gate)
    parts = [
        f"<h1>{escaped(title)}</h1>",
        _facts(registered, findings),
        section("Verdicts", "verdicts", _verdicts(findings, registered, withheld, unjudged)),
        section(
            "Failure signatures", "signatures", signatures_table(_signatures(results, registered, findings, withheld))
        ),
        section("Arms", "arms", _arms(results, registered)),
    ]
    if curves := curves_of(results, registered.protocol.metric):
        parts.append(section("Over data", "curves", _curves(curves, registered.protocol.metric)))
    if budgets := budgets_of(results, registered.protocol.metric):
        parts.append(section("Over model size", "sizes", _sizes(budgets, registered.protocol.metric)))
    if training:
        parts.append(section("Training", "training", training))
    parts.append(section("Runs", "runs", _runs(results, registered)))
    parts.append(section("How to read this", "reading", _READING))
    return page(title, "\n".join(parts))


_READING = """<ul>
<li>An effect is the baseline's value less the arm's, seed by seed, since both start alike and see the same samples;
the metric is the lower the better. Of several baselines the one with the better mean counts.</li>
<li><b>supported</b>: the interval lies above 0 and the estimate is at least the margin. <b>not supported</b>: the
interval lies below the margin. <b>inconclusive</b>: neither; the seeds that would decide are named.</li>
<li>Primary contrasts share a level of 5% by Holm's procedure. Exploratory ones and fewer than 8 seeds carry that
label.</li>
<li>Planted controls say whether the instrument can find an effect, and finds none where there is none. If one comes
out wrong, no verdict is given.</li>
<li>Seeds of a group are trained in one step and share their order of samples, and all runs start from one encoder:
intervals are those of the initialisation, given both.</li>
<li>Every run that was finished counts with the value it got. An arm of which more than a fifth collapsed has that in
place of a verdict.</li>
<li>A study of rendered scenes with a small model concerns the mechanism. It neither confirms nor refutes what was
reported of 200 million samples.</li>
</ul>"""


def _facts(registered: Registered, findings: Sequence[Finding]) -> str:
    protocol, about = registered.protocol, registered.about
    rows = {
        "Metric": f"{protocol.metric}, the lower the better",
        "Margin": f"{protocol.margin:g}" if protocol.contrasts else "",
        "Seeds": f"{protocol.num_seeds} planned"
        + (f", {min(one.contrast.num_seeds for one in findings)} run" if findings else ""),
        "Matching": protocol.matching,
        "Registered": f"{about['file']} ({about['digest']}) on {about['date']}"
        if about
        else "by hand"
        if protocol.contrasts
        else "",
        "Commit": about.get("commit", ""),
    }
    return definitions(rows)


# ---------------------------------------------------------------- verdicts


def _verdicts(findings: Sequence[Finding], registered: Registered, withheld: Sequence[str], unjudged: str) -> str:
    if not findings:
        return f"<p><b>None:</b> {escaped(unjudged or 'the protocol has no contrasts')}.</p>"
    warnings = "".join(f"<p><b>Withheld:</b> {escaped(reason)}.</p>" for reason in withheld)
    rows = []
    for one in findings:
        own = one.contrast
        rows.append((
            own.name, one.role, one.arm, one.baseline, f"{own.estimate:.4f}", f"{own.low:.4f} to {own.high:.4f}",
            str(own.num_seeds), _of(one.collapsed), _of(one.collapsed_baseline),
            shown_verdict(one, registered.protocol, bool(withheld)),
        ))  # fmt: skip
    header = ("contrast", "role", "arm", "baseline", "estimate", "interval", "seeds", "collapsed",
              "baseline collapsed", "verdict")  # fmt: skip
    drawing = _forest(findings, registered.protocol.margin, bool(withheld))
    return warnings + drawing + table("Contrasts", header, rows)


def _of(found: tuple[int, int] | None) -> str:
    return f"{found[0]} of {found[1]}" if found else "not measured"


def _forest(findings: Sequence[Finding], margin: float, is_withheld: bool) -> str:
    """Estimates with their intervals, a line at no effect and one at the margin."""
    figure, axes = new_figure(7.6, 0.9 + 0.42 * len(findings))
    for place, one in enumerate(reversed(findings)):
        own = one.contrast
        color = _WITHHELD if is_withheld and one.role in CLAIMS else _COLORS.get(one.verdict, _OTHER_COLOR)
        axes.plot([own.low, own.high], [place, place], color=color, linewidth=2)
        axes.plot([own.estimate], [place], "o" if one.role in CLAIMS else "s", color=color)
    axes.axvline(0, color="#59616f", linewidth=0.8)
    axes.axvline(margin, color="#59616f", linewidth=0.8, linestyle="--")
    labels = [one.contrast.name + ("" if one.role == "primary" else f" [{one.role}]") for one in reversed(findings)]
    axes.set_yticks(range(len(findings)), labels)
    axes.set_xlabel("effect (dashed: margin; squares: controls)")
    return image_of(figure, "Estimates and intervals of all contrasts; the table below has the figures")


# ---------------------------------------------------------------- failure signatures


def _signatures(
    results: Table, registered: Registered, findings: Sequence[Finding], withheld: Sequence[str]
) -> list[Signature]:
    metric = registered.protocol.metric
    return [
        _of_pixels(findings, registered.protocol.margin, withheld),
        _of_understanding(curves_of(results, metric)),
        _of_rollouts(results, [arm for arm, _ in registered.protocol.contrasts.values()]),
        _of_kinds(results),
    ]


def _of_pixels(findings: Sequence[Finding], margin: float, withheld: Sequence[str]) -> Signature:
    """Of the first contrast of a pixel arm with an understanding one."""
    for one in findings:
        if one.arm.startswith("pixel_") and one.baseline.startswith("understanding") and one.role in CLAIMS:
            if withheld:
                return not_measured(failure_signatures.UNDERSTANDING, "the verdicts are withheld")
            own = one.contrast
            return failure_signatures.of_pixels(
                f"{one.arm} against {one.baseline}", own.estimate, own.low, own.high, margin
            )
    return not_measured(failure_signatures.UNDERSTANDING, "takes a contrast of an arm pixel_... with understanding")


def _of_understanding(curves: Mapping[str, scaling.Curve]) -> Signature:
    for name, curve in curves.items():
        if name.startswith("understanding"):
            losses = curve.losses.mean(axis=1).tolist()
            return failure_signatures.of_understanding_curve(name, curve.sizes.tolist(), losses)
    return not_measured(failure_signatures.SCALING, "takes arms understanding@SIZE")


def _of_rollouts(results: Table, arms: Sequence[str]) -> Signature:
    """Of the first arm of a contrast whose rollouts were judged."""
    judged = [results.get(f"rollout_error/{name}", {}) for name in ("growth", "horizon", "num_positions")]
    for arm in (one for one in (*arms, *judged[0]) if all(one in of_arms for of_arms in judged)):
        growth, horizon, length = (of_arms[arm] for of_arms in judged)
        values = np.array(list(growth.values()))
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.inf
        half = special.stdtrit(max(len(values) - 1, 1), 0.975) * error
        interval = (values.mean(), values.mean() - half, values.mean() + half)
        positions = float(np.mean(list(horizon.values()))), int(max(length.values()))
        return failure_signatures.of_rollouts(arm, interval, *positions)
    return not_measured(failure_signatures.ACCUMULATION, "takes runs with eval.rollout_judge")


def _of_kinds(results: Table) -> Signature:
    """Of the first benchmark that has a twin, over all arms."""
    for name, by_arm in results.items():
        twin = results.get(f"{name}_heldout")
        if name.startswith("accuracy/") and twin:
            accuracy, heldout = (np.mean([v for own in one.values() for v in own.values()]) for one in (by_arm, twin))
            return failure_signatures.of_kinds(f"{name} over all arms", float(accuracy), "held out", float(heldout))
    return not_measured(failure_signatures.GENERALISATION, "takes benchmarks NAME and NAME_heldout")


# ---------------------------------------------------------------- arms


def _arms(results: Table, registered: Registered) -> str:
    shown = [name for first in SHOWN_FIRST for name in results if name.partition("/")[0] == first]
    metrics = [name for name in dict.fromkeys([registered.protocol.metric, *shown]) if name in results]
    arms = list(dict.fromkeys(arm for name in metrics for arm in results[name]))
    rows = []
    for arm in arms:
        cost = list(results.get("pflop", {}).get(arm, {}).values())
        cells = [_mean_and_spread(results[name].get(arm, {})) for name in metrics]
        num_seeds = max(len(results[name].get(arm, {})) for name in metrics)
        rows.append((arm, str(num_seeds), *cells, _of(collapsed_runs(results, arm)),
                     f"{np.mean(cost):.4g}" if cost else "–"))  # fmt: skip
    header = ("arm", "seeds", *metrics, "collapsed", "PFLOP a run")
    return _strips(results, registered.protocol.metric) + table("Means over seeds ± standard deviation", header, rows)


def _mean_and_spread(values: Mapping[int, float]) -> str:
    own = list(values.values())
    if not own:
        return "–"
    return f"{np.mean(own):.4f}" + (f" ± {np.std(own, ddof=1):.4f}" if len(own) > 1 else "")


def _strips(results: Table, metric: str) -> str:
    """Every seed of every arm; runs of a seed are paired, so its points have one colour."""
    arms = [arm for arm in results.get(metric, {}) if SIZE_MARK not in arm]
    if not arms:
        return ""
    figure, axes = new_figure(7.6, 0.9 + 0.34 * len(arms))
    for place, arm in enumerate(reversed(arms)):
        own = results[metric][arm]
        axes.scatter(list(own.values()), [place] * len(own), c=list(own), cmap="viridis", s=18)
        axes.plot([np.mean(list(own.values()))], [place], "|", color="#1f2430", markersize=14)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlabel(f"{metric} (a point for each seed, one colour for a seed; bar: mean)")
    return image_of(figure, f"{metric} of every seed of every arm; the table below has means and deviations")


# ---------------------------------------------------------------- curves


def curves_of(results: Table, metric: str) -> dict[str, scaling.Curve]:
    """Arms written NAME@SIZE as curves over size, with the seeds that all sizes have; those of two sizes or more."""
    by_name: dict[str, dict[int, Mapping[int, float]]] = {}
    for arm, values in results.get(metric, {}).items():
        name, mark, size = arm.partition(SIZE_MARK)
        if mark and size.isdigit():
            by_name.setdefault(name, {})[int(size)] = values
    found = {}
    for name, by_size in by_name.items():
        seeds = sorted(set.intersection(*(set(values) for values in by_size.values())))
        if len(by_size) > 1 and seeds:
            sizes = sorted(by_size)
            losses = np.array([[by_size[size][seed] for seed in seeds] for size in sizes])
            found[name] = scaling.Curve(np.array(sizes, float), losses)
    return found


def describe_curves(curves: Mapping[str, scaling.Curve]) -> Iterator[tuple[str, str, str]]:
    """(curve, quantity, value with its interval); or why there is none."""
    fitted = {}
    for name, curve in curves.items():
        try:
            scaling.require_points(curve)
        except ValueError as error:
            yield name, "law", str(error)
        else:
            fitted[name] = curve
    if not fitted:
        return
    names = list(fitted)

    def statistics(laws: Mapping[str, scaling.Law]) -> dict[str, float]:
        values = {f"{name}|{key}": value for name, law in laws.items() for key, value in law.coefficients.items()}
        for first, name in itertools.combinations(names, 2):
            values[f"{name}|exponent less that of {first}"] = (
                laws[name].coefficients["alpha"] - laws[first].coefficients["alpha"]
            )
            middle = float(np.median(fitted[first].losses.mean(axis=1)))
            values[f"{name}|data multiplier against {first} at {middle:.3f}"] = float(
                scaling.data_multiplier(laws[first], laws[name], middle)
            )
        return values

    for key, (value, low, high) in scaling.bootstrap(fitted, statistics).items():
        name, _, quantity = key.partition("|")
        yield name, quantity, f"{value:.4g} ({low:.4g} to {high:.4g})"


def _curves(curves: Mapping[str, scaling.Curve], metric: str) -> str:
    figure, axes = new_figure(7.6, 4.2)
    for number, (name, curve) in enumerate(curves.items()):
        mean = curve.losses.mean(axis=1)
        color = f"C{number}"
        axes.plot(curve.sizes, mean, "o-", color=color, label=name)
        for seed in range(curve.losses.shape[1]):
            axes.plot(curve.sizes, curve.losses[:, seed], ".", color=color, alpha=0.35)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("size (pairs)")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    rows = list(describe_curves(curves))
    image = image_of(figure, f"{metric} over the number of pairs; the table below has the fitted laws")
    return image + table("Fitted laws L = E + A D^-alpha, with 95% intervals", ("curve", "quantity", "value"), rows)


# ---------------------------------------------------------------- model sizes


def budgets_of(results: Table, metric: str) -> dict[tuple[str, int], dict[float, float]]:
    """{(name, GFLOP): {trained parameters: mean of the metric}} of arms written NAME@100GFLOP-SIZE, over the seeds that
    all sizes of a budget have.
    """
    by_budget: dict[tuple[str, int], dict[float, Mapping[int, float]]] = {}
    for arm, values in results.get(metric, {}).items():
        parameters = results.get("parameters", {}).get(arm)
        if parameters and (match := BUDGET.fullmatch(arm)):
            size = float(np.mean(list(parameters.values())))
            by_budget.setdefault((match[1], int(match[2])), {})[size] = values
    found = {}
    for key, by_size in by_budget.items():
        seeds = set.intersection(*(set(values) for values in by_size.values()))
        if seeds:
            found[key] = {size: float(np.mean([values[seed] for seed in seeds])) for size, values in by_size.items()}
    return found


def _sizes(budgets: Mapping[tuple[str, int], Mapping[float, float]], metric: str) -> str:
    figure, axes = new_figure(7.6, 4.2)
    rows = []
    for (name, budget), losses in sorted(budgets.items()):
        sizes = sorted(losses)
        axes.plot(sizes, [losses[size] for size in sizes], "o-", label=f"{name}, {budget:,} GFLOP")
        rows.append((name, f"{budget:,}", str(len(sizes)), _optimum(losses)))
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    image = image_of(figure, f"{metric} over model size at equal training; the table below has the best sizes")
    return image + table("Best sizes: vertices of parabolas", ("curve", "GFLOP", "sizes", "optimum"), rows)


def _optimum(losses: Mapping[float, float]) -> str:
    try:
        best = scaling.isoflop_optimum(list(losses), list(losses.values()))
    except ValueError as error:
        return str(error)
    inside = "" if best.is_inside else " (outside of the sizes that were run: no more than a direction)"
    return f"{best.parameters:,.0f} parameters, {best.loss:.4f}{inside}"


# ---------------------------------------------------------------- runs


def _runs(results: Table, registered: Registered) -> str:
    metric = registered.protocol.metric
    rows = [
        (arm, str(seed), f"{value:.4f}", "yes" if results.get(COLLAPSED, {}).get(arm, {}).get(seed, 0) else "")
        for arm, values in results.get(metric, {}).items()
        for seed, value in sorted(values.items())
    ]
    return (
        f"<details><summary>All {len(rows)} of them</summary>"
        + table("Every model that was trained", ("arm", "seed", metric, "collapsed"), rows)
        + "</details>"
    )
