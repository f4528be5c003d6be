"""Whether two runs, or two steps of one, differ on a benchmark: paired by item, clustered by picture.

Both answered the same items, so the difference of two accuracies has a smaller error than either. Two tests, and a
verdict only where both agree: the exact McNemar test on items that one has right and the other wrong (which takes items
for independent), and a bootstrap of the difference that draws pictures, with all of their items (which does not).
"""

import dataclasses
import fractions
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unihetero_jax.config import pixel_role, visual_target
from unihetero_jax.config_reading import differences
from unihetero_jax.storage import file_exists, list_folder, read_bytes, to_path
from unihetero_jax.text_table import align

LEVEL = 0.05
"""Error of the first kind; shared by the categories of a benchmark (Bonferroni)."""
POWER = 0.8
"""For the number of items that would be needed."""
NUM_DRAWS = 10_000
_DRAWS_AT_ONCE = 500


@dataclasses.dataclass(frozen=True)
class Difference:
    """B against A on the same items.

    Attributes:
        benchmark, category: category "overall" is the whole benchmark.
        num_items, num_clusters: items, and pictures that they share.
        accuracy_a, accuracy_b: shares.
        difference: b - a; `low` and `high` its interval at 1 - LEVEL (categories: narrower by their number).
        only_a, only_b: items on which only one is right (of shares: on which one is better).
        p_value: of the exact McNemar test, two-sided.
        verdict: "better", "worse" (B than A) or "not distinguishable".
        items_needed: items of this kind at which a difference as large as this would be found with probability POWER;
            None where there is no difference at all.
    """

    benchmark: str
    category: str
    num_items: int
    num_clusters: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float
    verdict: str
    items_needed: int | None


def compare_hits(
    benchmark: str,
    category: str,
    hits_a: Sequence[float],
    hits_b: Sequence[float],
    clusters: Sequence[str],
    level: float = LEVEL,
) -> Difference:
    """The difference of two sequences of hits (0 or 1), or of shares, over the same items, in the same order."""
    a, b = np.asarray(hits_a, float), np.asarray(hits_b, float)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p_value = mcnemar(only_a, only_b)
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(place, b - a), np.bincount(place).astype(float)
    low, high = _bootstrap(sums, sizes, level)
    difference = float((b - a).mean())
    is_clear = p_value < level and (low > 0 or high < 0)
    verdict = ("better" if difference > 0 else "worse") if is_clear else "not distinguishable"
    error = math.sqrt(np.square(sums - difference * sizes).sum()) / len(a)
    return Difference(
        benchmark, category, len(a), len(names), float(a.mean()), float(b.mean()), difference, low, high, only_a,
        only_b, p_value, verdict, _items_needed(len(a), difference, error, level),
    )  # fmt: skip


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: how often fair coins would divide the items on which two runs differ so unevenly."""
    count, fewer = only_a + only_b, min(only_a, only_b)
    extreme, ways = 0, 1
    for k in range(fewer + 1):
        extreme += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, float(fractions.Fraction(2 * extreme, 2**count)))


def _bootstrap(sums: np.ndarray, sizes: np.ndarray, level: float) -> tuple[float, float]:
    """Percentiles of the mean difference over draws of as many clusters, with replacement; seed 0."""
    rng, count = np.random.default_rng(0), len(sums)
    means = []
    for _ in range(0, NUM_DRAWS, _DRAWS_AT_ONCE):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS_AT_ONCE)
        means.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), (level / 2, 1 - level / 2))
    return float(low), float(high)


def _items_needed(num_items: int, difference: float, error: float, level: float) -> int | None:
    """n (z(1 - level / 2) + z(power))^2 (error / difference)^2: errors fall with the root of the number of items."""
    if difference == 0 or error == 0:
        return None
    normal = statistics.NormalDist()
    z = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)
    return math.ceil(num_items * (z * error / difference) ** 2)


def compare_results(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The whole benchmark and each of its categories, from two result files.

    Raises:
        ValueError: the two are of other data, another mode or other items.
    """
    for key in ("data_hash", "mode", "scorer", "prompt_template", "image_transform"):
        if a.get(key) != b.get(key):
            raise ValueError(f"{name}: the two results differ in {key} ({a.get(key)} and {b.get(key)}); evaluate anew")
    if a["items"].keys() != b["items"].keys():
        raise ValueError(f"{name}: the two results are of other items")
    indices = list(a["items"])
    groups: dict[str, list[str]] = {}
    for index in indices:
        groups.setdefault(a["categories"][index], []).append(index)

    def compared(category: str, chosen: Sequence[str], level: float) -> Difference:
        hits_a, hits_b = ([result["items"][index] for index in chosen] for result in (a, b))
        return compare_hits(name, category, hits_a, hits_b, [a["clusters"][index] for index in chosen], level)

    rows = [compared(category, chosen, LEVEL / len(groups)) for category, chosen in groups.items()]
    return [*(rows if len(groups) > 1 else []), compared("overall", indices, LEVEL)]


def compare_runs(run_a: str, run_b: str, mode: str = "likelihood") -> list[Difference]:
    """All benchmarks that both runs have results of.

    Args:
        run_a, run_b: `WORKDIR` (the newest step that was evaluated) or `WORKDIR@STEP`.
        mode: of the results.

    Raises:
        ValueError: a run has no results, or the two have none in common.
    """
    found_a, found_b = (read_results(workdir, mode, step) for workdir, step in map(_split, (run_a, run_b)))
    common = [name for name in found_a if name in found_b]
    if not common:
        raise ValueError(
            f"{run_a} has results of {', '.join(found_a)}, {run_b} of {', '.join(found_b)}: none in common; "
            "run evaluate on both with the same benchmarks"
        )
    return [row for name in common for row in compare_results(name, found_a[name], found_b[name])]


SHARED_TREATMENT = (
    "loss.visual_weight", "loss.visual_weight_start", "loss.visual_ramp_steps", "loss.visual_loss", "loss.target_norm",
    "loss.target", "loss.ema_decay", "loss.cut_input_gradient", "loss.visual_loss_on", "loss.pixel_weight",
    "model.semantic_head", "model.pixel_decoder",
)  # fmt: skip
"""What is to be equal where objectives are compared that differ in what they predict."""
SHARED_SETTING = (
    "seed", "data", "scene_world", "train.num_steps", "train.global_batch_rows", "optimizer", "init_from",
    "model.encoder", "model.projector", "model.decoder", "model.compute_dtype",
)  # fmt: skip
"""What is to be equal whatever is compared: data, length, optimizer, start and model."""


def unlike_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Where two plain configurations differ beside what is compared, as `path: a -> b`.

    The treatment counts where both have a visual or a pixel loss: then a difference of scores may come from lambda or
    the size of the head as well as from the target (design section 2).
    """
    treated = all(visual_target(one["objective"]) or pixel_role(one["objective"]) for one in (a, b))
    # How rows are read, and where from, is no part of the stream.
    paths = SHARED_SETTING + (SHARED_TREATMENT if treated else ())
    ignored = ("data.num_threads", "data.prefetch_batches", "data.cache")
    found = []
    for change in differences(a, b):
        path = change.partition(":")[0]
        is_shared = any(path == shared or path.startswith(f"{shared}.") for shared in paths)
        if is_shared and not path.startswith(ignored):
            found.append(change)
    return found


def unlike_runs(run_a: str, run_b: str) -> list[str]:
    """`unlike_settings` of two runs; of two steps of one, and where a folder has no configuration, nothing."""
    paths = [to_path(_split(run)[0]) / "config.json" for run in (run_a, run_b)]
    if paths[0] == paths[1] or not all(file_exists(path) for path in paths):
        return []
    return unlike_settings(*(json.loads(read_bytes(path)) for path in paths))


def _split(run: str) -> tuple[str, int | None]:
    """`WORKDIR@STEP` as folder and step."""
    named = re.fullmatch(r"(.+)@(\d+)", run)
    return (named[1], int(named[2])) if named else (run, None)


def read_results(
    workdir: epath.PathLike, mode: str | None = None, step: int | None = None
) -> dict[str, dict[str, Any]]:
    """Results of a run by benchmark, those of the step that is named or else of each benchmark's newest.

    Args:
        workdir: of the run.
        step: None: the newest.
        mode: only results of this mode; None: all, those of other modes than `likelihood` under `name (mode)`.

    Raises:
        ValueError: there are none.
    """
    folder = to_path(workdir) / "eval"
    results: dict[str, dict[str, Any]] = {}
    for path in list_folder(folder):
        if path.suffix != ".json":
            continue
        result = json.loads(read_bytes(path))
        if "items" not in result or "clusters" not in result:  # a rollout, or of an older version
            continue
        if (mode and result["mode"] != mode) or step not in (None, result["step"]):
            continue
        is_plain = mode or result["mode"] == "likelihood"
        name = result["benchmark"] if is_plain else f"{result['benchmark']} ({result['mode']})"
        if name not in results or results[name]["step"] < result["step"]:
            results[name] = result
    if not results:
        wanted = (f" of mode {mode}" if mode else "") + (f" of step {step}" if step is not None else "")
        raise ValueError(f"{workdir}: no results{wanted} in {folder}; run evaluate first")
    return results


def format_differences(rows: Sequence[Difference], run_a: str, run_b: str, unlike: Sequence[str] = ()) -> str:
    """The table of `compare`, labelled with what else differs."""
    table = [("benchmark", "category", "items", "A", "B", "B - A", "interval", "McNemar p", "B is", "items needed")]
    for row in rows:
        needed = "-" if row.items_needed is None else f"{row.items_needed:,}"
        table.append((
            row.benchmark, row.category, str(row.num_items), f"{row.accuracy_a:.3f}", f"{row.accuracy_b:.3f}",
            f"{row.difference:+.3f}", f"{row.low:+.3f} to {row.high:+.3f}", f"{row.p_value:.3g}", row.verdict, needed,
        ))  # fmt: skip
    notes = [
        f"A: {run_a}; B: {run_b}. Paired by item; intervals at {1 - LEVEL:.0%} (categories share the {LEVEL:.0%}) by a "
        "bootstrap over pictures;",
        f"items needed: to find a difference of this size with probability {POWER:.0%}. B is better or worse where "
        "interval and McNemar test agree.",
    ]
    if unlike:
        notes += ["NOT LIKE FOR LIKE: beside the objective the runs differ in", *(f"  {change}" for change in unlike)]
    return "\n".join([*align(table), *notes])
