"""`report` of one run: what it learned, what it generated, what it cost, and what of the known failures it shows.

Everything comes from the run's own files: `metrics.jsonl`, `config.json` and what `evaluate` has written under eval/.
What was not measured is absent, but for the failure signatures, which say how to measure it. A second run may be drawn
over the first (`--against`).
"""

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unihetero_jax import failure_signatures
from unihetero_jax.config_reading import differences
from unihetero_jax.evaluate_run import ROLLOUT_ERROR
from unihetero_jax.failure_signatures import Signature, not_measured, signatures_table
from unihetero_jax.figures import image_of, image_of_png, new_figure
from unihetero_jax.html_page import definitions, escaped, page, section, table
from unihetero_jax.metrics import METRICS_NAME, read_metrics
from unihetero_jax.storage import list_folder, read_bytes, to_path

MAX_DRAWN = 8
"""Pictures that are shown of each step's drawings."""
TERMS = ("text", "visual", "pixel", "within_spread", "across_spread", "copy_previous_cosine")
"""Of `metrics.jsonl`, in the order of their figures."""


class _Stored:
    """What a run has written."""

    def __init__(self, workdir: epath.PathLike, flag: str):
        self.workdir = to_path(workdir)
        if not (self.workdir / METRICS_NAME).exists():
            raise ValueError(f"--{flag}={workdir}: there is no {METRICS_NAME}; name the folder of a run or of a sweep")
        self.lines = read_metrics(self.workdir)
        if not self.lines:
            raise ValueError(f"--{flag}={workdir}: {METRICS_NAME} has no line yet; wait until the run has logged one")
        self.config = json.loads(read_bytes(self.workdir / "config.json"))
        folder = self.workdir / "eval"
        self.results = {
            path.name: json.loads(read_bytes(path)) for path in list_folder(folder) if path.suffix == ".json"
        }

    def benchmarks(self) -> list[dict[str, Any]]:
        """Results with accuracies, by benchmark and step."""
        found = [result for result in self.results.values() if "benchmark" in result]
        return sorted(found, key=lambda one: (one["benchmark"], one["step"], one.get("replicate", 0)))

    def newest(self, prefix: str) -> tuple[str, dict[str, Any]] | None:
        """(file name, result) of the last step's `PREFIX-<step>.json`."""
        found = {
            int(name[len(prefix) + 1 : -len(".json")]): name
            for name in self.results
            if name.startswith(f"{prefix}-") and name[len(prefix) + 1 : -len(".json")].isdigit()
        }
        return (found[max(found)], self.results[found[max(found)]]) if found else None


def render_run(workdir: epath.PathLike, title: str, against: epath.PathLike = "") -> str:
    """The page of the run in `workdir`, drawn over that in `against` if one is named.

    Raises:
        ValueError: there is no run, or it has logged nothing yet.
    """
    run = _Stored(workdir, "workdir")
    reference = _Stored(against, "against") if against else None
    parts = {
        "Failure signatures": signatures_table(list(_signatures(run))),
        "Losses": _losses(run, reference),
        "Losses by source": _losses_by_source(run, reference),
        "Benchmarks": _benchmarks(run, reference),
        "Cumulative error": _picture_of(run, ROLLOUT_ERROR, "Error of rollouts by position (replicate 0)"),
        "Gradients and retention by layer": _picture_of(run, "layers", "Gradient conflict, retention, probes"),
        "Generations": _generations(run),
        "Data": _data(run),
        "Cost": _cost(run, reference),
        "Configuration": _configuration(run, reference),
    }  # fmt: skip
    body = [f"<h1>{escaped(title)}</h1>", _facts(run, reference)]
    body += [section(name, name.lower().replace(" ", "-"), content) for name, content in parts.items() if content]
    return page(title, "\n".join(body))


def _facts(run: _Stored, reference: _Stored | None) -> str:
    last = run.lines[-1]
    rows = {
        "Run": run.workdir, "Objective": last["objective"], "Step": f"{last['step']:,} of "
        f"{run.config['train']['num_steps']:,}", "Seed": run.config["seed"], "Configuration": last["config_hash"],
        "Skipped steps": last.get("skipped_steps", 0), "Against": reference.workdir if reference else "",
    }  # fmt: skip
    return definitions(rows)


# ---------------------------------------------------------------- failure signatures


def _signatures(run: _Stored) -> Iterator[Signature]:
    yield not_measured(failure_signatures.UNDERSTANDING, "takes arms and seeds; see the page of a sweep of claim 1")
    yield not_measured(failure_signatures.SCALING, "takes runs of several sizes; see the page of a sweep of claim 2")
    if found := run.newest(ROLLOUT_ERROR):
        result = found[1]
        length = len(result["curves"]["free_running"])
        yield failure_signatures.of_rollouts(run.lines[-1]["objective"], result["growth"], result["horizon"][0], length)
    else:
        yield not_measured(failure_signatures.ACCUMULATION, "evaluate --rollout-judge=RUN")
    if twins := _newest_twins(run.benchmarks()):
        yield failure_signatures.of_kinds(*twins)
    else:
        yield not_measured(failure_signatures.GENERALISATION, "takes benchmarks NAME and NAME_heldout")


def _newest_twins(results: Sequence[Mapping[str, Any]]) -> tuple[str, float, str, float] | None:
    """Benchmark, accuracy, its held-out twin, that one's accuracy: of one step, mode and replicate."""
    by_occasion: dict[tuple[int, int, str], dict[str, float]] = {}
    for one in results:
        occasion = one["step"], -one.get("replicate", 0), one["mode"]
        by_occasion.setdefault(occasion, {})[one["benchmark"]] = one["overall"]["accuracy"]
    for _, found in sorted(by_occasion.items(), reverse=True):
        for name in found:
            if (heldout := f"{name}_heldout") in found:
                return name, found[name], heldout, found[heldout]
    return None


# ---------------------------------------------------------------- curves


def _losses(run: _Stored, reference: _Stored | None) -> str:
    """A figure for each term that the run has."""
    figures = []
    for term in TERMS:
        curves = {
            which: _points(stored.lines, functools.partial(_in_training, term=term))
            for which, stored in (("this run", run), ("against", reference))
            if stored
        }
        if curves["this run"]:
            figures.append(_curves(term.replace("_", " "), curves, f"{term} over the steps"))
    return f'<div class="charts">{"".join(figures)}</div>'


def _losses_by_source(run: _Stored, reference: _Stored | None) -> str:
    """Of validation rows, as the last line has them."""
    figures = []
    evaluated = [line for line in run.lines if line.get("eval_loss")]
    for source, terms in evaluated[-1]["eval_loss"].items() if evaluated else ():
        for term in terms:
            curves = {
                which: _points(stored.lines, functools.partial(_held_out, source=source, term=term))
                for which, stored in (("this run", run), ("against", reference))
                if stored
            }
            figures.append(
                _curves(f"{source}: {term}, held out", curves, f"held-out {term} of {source} over the steps")
            )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _in_training(line: Mapping[str, Any], term: str, of: str = "terms") -> Any:
    return line.get(of, {}).get(term, {}).get("mean")


def _held_out(line: Mapping[str, Any], source: str, term: str) -> Any:
    return (line.get("eval_loss") or {}).get(source, {}).get(term)


def _points(lines: Sequence[Mapping[str, Any]], read: Callable[..., Any]) -> list[tuple[int, float]]:
    """(step, value) where there is one; of several replicates the mean of those that have one."""
    values = [(line["step"], np.array(read(line), np.float64)) for line in lines]
    return [(step, float(np.nanmean(value))) for step, value in values if not np.isnan(value).all()]


def _curves(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], description: str) -> str:
    is_crowded = len(curves) > 4
    figure, axes = new_figure(*((7.6, 1.2 + 0.17 * max(len(curves), 10)) if is_crowded else (3.8, 2.6)))
    for number, (name, points) in enumerate(curves.items()):
        if points:
            style = ("-", "--", ":", "-.")[number // 10 % 4]  # colours repeat after ten
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=name, linewidth=1.2, marker="." if len(points) < 9 else "")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    if is_crowded:
        figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    elif len(curves) > 1:
        axes.legend(frameon=False, fontsize=7)
    return image_of(figure, description)


def curves_of_sweep(workdir: epath.PathLike, names: Collection[str]) -> str:
    """Losses of all arms over the steps, a figure for each loss and source, HTML; means over an arm's runs.

    Args:
        workdir: of the sweep; if its runs are no longer there, nothing is drawn.
        names: of the runs that count, `ARM-SEED-HASH`: those of an earlier plan may lie beside them.
    """
    by_arm: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in list_folder(to_path(workdir) / "runs"):
        is_meant = folder.name in names and (folder / METRICS_NAME).exists()
        lines = read_metrics(folder) if is_meant else []
        if lines:
            by_arm.setdefault(folder.name.rsplit("-", 2)[0], []).append(lines)
    runs = [lines for of_arm in by_arm.values() for lines in of_arm]
    readers = {term: functools.partial(_in_training, term=term) for term in TERMS}
    sources = dict.fromkeys(source for lines in runs for source in lines[-1].get("text_by_source", {}))
    readers |= {
        f"text, {source}": functools.partial(_in_training, term=source, of="text_by_source") for source in sources
    }
    figures = []
    for name, read in readers.items():
        curves = {arm: _mean_points([_points(lines, read) for lines in of_arm]) for arm, of_arm in by_arm.items()}
        if drawn := {arm: points for arm, points in curves.items() if points}:
            figures.append(_curves(name.replace("_", " "), drawn, f"{name} of every arm over the steps"))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _mean_points(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """At the steps that all curves have."""
    tables = [dict(points) for points in curves]
    steps = sorted(set.intersection(*(set(one) for one in tables)))
    return [(step, float(np.mean([one[step] for one in tables]))) for step in steps]


# ---------------------------------------------------------------- tables


def _benchmarks(run: _Stored, reference: _Stored | None) -> str:
    rows = []
    for which, stored in (("this run", run), ("against", reference)):
        for result in stored.benchmarks() if stored else ():
            overall = result["overall"]
            rows.append((
                result["benchmark"], which, str(result["step"]), str(result.get("replicate", 0)), result["mode"],
                f"{overall['accuracy']:.3f}",
                f"{1.96 * overall['standard_error']:.3f}", _number(overall.get("chance"), ".3f"),
                _number(overall.get("answer_nll_per_token"), ".4f"),
            ))  # fmt: skip
    header = ("benchmark", "run", "step", "replicate", "mode", "accuracy", "± 95%", "chance", "NLL per answer token")
    return table("All that was evaluated", header, rows) if rows else ""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _picture_of(run: _Stored, prefix: str, description: str) -> str:
    """The picture that the instrument wrote beside its newest result."""
    found = run.newest(prefix)
    path = run.workdir / "eval" / found[0].replace(".json", ".png") if found else None
    return image_of_png(read_bytes(path), description) if path and path.exists() else ""


def _generations(run: _Stored) -> str:
    """Sheets of the workdir, and by step the first pictures of `evaluate --drawings`."""
    parts = [
        f"<h3>{escaped(path.name)}</h3>" + image_of_png(read_bytes(path), f"Sheet {path.name}")
        for path in list_folder(run.workdir) if path.suffix == ".png"
    ]  # fmt: skip
    folders = [path for path in list_folder(run.workdir / "eval") if path.name.partition("-")[0] == "drawings"]
    for folder in sorted((one for one in folders if one.is_dir()), key=lambda one: int(one.name.partition("-")[2])):
        step = folder.name.partition("-")[2]
        for kind in list_folder(folder):
            pictures = "".join(
                f"<td>{image_of_png(read_bytes(path), f'{kind.name} at step {step}')}</td>"
                for path in sorted(list_folder(kind))[:MAX_DRAWN]
            )
            parts.append(f"<h3>{escaped(kind.name)}, step {step}</h3><table><tr>{pictures}</tr></table>")
    return "".join(parts)


def _data(run: _Stored) -> str:
    totals = run.lines[-1]["totals"]
    columns = list(dict.fromkeys(name.partition("/")[0] for name in totals if "/" in name))
    sources = list(dict.fromkeys(name.partition("/")[2] for name in totals if "/" in name))
    rows = [(source, *(f"{totals.get(f'{column}/{source}', 0):,}" for column in columns)) for source in sources]
    padding = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in totals.items() if "/" not in name)
    return table("What was drawn of each source so far", ("source", *(c.replace("_", " ") for c in columns)), rows) + (
        f'<p class="note">{escaped(padding)}</p>'
    )


def _cost(run: _Stored, reference: _Stored | None) -> str:
    rows = []
    for which, stored in (("this run", run), ("against", reference)):
        lines = [line for line in stored.lines if "step_time_s" in line] if stored else []
        if lines:
            rows.append((which, *(_median(lines, name) for name in COSTS)))
    return table("Medians over the logged intervals", ("run", *COSTS.values()), rows) if rows else ""


COSTS = {
    "step_time_s": "step (s)", "tokens_per_s": "tokens/s", "model_flops_per_s": "model FLOP/s",
    "input_wait_share": "share of time waiting for data",
}  # fmt: skip


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [line[name] for line in lines if line.get(name) is not None]
    return f"{np.median(values):,.4g}" if values else "–"


def _configuration(run: _Stored, reference: _Stored | None) -> str:
    if not reference:
        text = json.dumps(run.config, indent=1)
        return f"<details><summary>All of it</summary><pre>{escaped(text)}</pre></details>"
    rows = [(line,) for line in differences(run.config, reference.config)]
    return table("Where the two runs differ", ("field: this run, against",), rows) if rows else "<p>The same.</p>"
