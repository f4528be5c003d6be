"""What is fixed before the runs of a sweep: its protocol, and what all of its arms have in common."""

import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihetero_jax.checkpoint import valid_step
from unihetero_jax.claims import Matching, Protocol
from unihetero_jax.config import Config, to_dict
from unihetero_jax.evaluate_run import is_judged
from unihetero_jax.metrics import announce
from unihetero_jax.sweep_plan import Planned, flat_fields, path_of, protocol_of, run_flops, trained_parameters
from unihetero_jax.workdir import write_atomically

PROTOCOL_FILE = "protocol.json"
MATCHED_WITHIN = 0.01


def register(flag: str, planned: Sequence[Planned], workdir: Path) -> None:
    """Writes the protocol beside the results, once; voids it where file, protocol or plan changed since a run."""
    protocol = protocol_of(flag, planned)
    if protocol is None:
        return
    path, target = path_of(flag), workdir / PROTOCOL_FILE
    origins = _starting_points(planned)
    about = {
        "file": os.fspath(path), "digest": _digest(path, protocol, planned, origins), "commit": _commit_of(path),
        "starts_from": origins, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    has_runs = any((workdir / "runs").glob("*"))
    if has_runs and not target.exists():
        changed = [f"registered after the first run, on {about['date']}"]
        stored = dataclasses.asdict(protocol) | {"registered": about, "changed": changed}
        announce(f"VOID: {workdir} has runs from before its protocol; `verify-claims` gives no verdicts. Use another "
                 "workdir to begin anew")  # fmt: skip
    elif has_runs:
        stored = json.loads(target.read_text())
        if "registered" not in stored:
            raise ValueError(f"{target} was written by hand, field `registered` is missing; use another --workdir")
        if stored["registered"]["digest"] == about["digest"]:
            return
        stored["changed"] = [*stored.get("changed", []), f"{about['digest']} on {about['date']}"]
        announce(f"VOID: {path} is not what {target} registered on {stored['registered']['date']}; `verify-claims` "
                 "gives no verdicts. Use another workdir to begin anew")  # fmt: skip
    else:
        stored = dataclasses.asdict(protocol) | {"registered": about}
    write_atomically(target, json.dumps(stored, indent=1) + "\n")


def _digest(path: Path, protocol: Protocol, planned: Sequence[Planned], origins: Mapping[str, str]) -> str:
    """Of the file, of what it says, of every run's whole configuration, and of what they start from."""
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8)
    said = json.dumps([dataclasses.asdict(protocol), dict(sorted(origins.items()))])
    for text in (said, *sorted(one.name for one in planned)):
        digest.update(text.encode())
    return digest.hexdigest()


def _starting_points(planned: Sequence[Planned]) -> dict[str, str]:
    """{workdir: digest of the stored step} of every run that another one starts from, or is judged by."""
    found = {}
    begun = {(one.config.init_from.workdir, one.config.init_from.step) for one in planned}
    judges = {(one.config.eval.rollout_judge, -1) for one in planned if is_judged(one.config)}
    for workdir, step in begun | judges:
        if not workdir:
            continue
        folder = valid_step(workdir, None if step < 0 else step)
        found[workdir] = hashlib.blake2b((folder / "manifest.json").read_bytes(), digest_size=8).hexdigest()
    return found


def _commit_of(path: Path) -> str:
    """The commit that holds the file as it is, or why there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=path.resolve().parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("status", "--porcelain", "--", path.name):
            return f"not committed (HEAD {git('rev-parse', 'HEAD')})"
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository"


def check_matching(planned: Sequence[Planned], protocol: Protocol) -> None:
    """Whether the runs that a contrast compares, seed by seed, have in common what the protocol says.

    `data`: samples, order, initialisation, batch and steps; which of them carry a loss may differ. `flops`: model FLOPs
    of the whole run within 1%. `parameters`: the data, and trained parameters within 1%.

    Raises:
        ValueError: two runs differ; names both and what differs.
    """
    by_name = {(one.arm, one.config.seed): one for one in planned}
    for arm, baselines in protocol.contrasts.values():
        for one in (one for one in planned if one.arm == arm):
            for baseline in baselines:
                if other := by_name.get((baseline, one.config.seed)):
                    _check_pair(other, one, protocol.matching)


def _check_pair(baseline: Planned, arm: Planned, matching: Matching) -> None:
    match matching:
        case "data":
            _check_equal_data(baseline, arm)
        case "flops":
            _check_equal_cost(baseline, arm, run_flops, "flops")
        case "parameters":
            _check_equal_data(baseline, arm)
            _check_equal_cost(baseline, arm, trained_parameters, "parameters")


def _check_equal_data(first: Planned, other: Planned) -> None:
    found = [flat_fields(_seen_data(one.config)) for one in (first, other)]
    differing = sorted(path for path in {**found[0], **found[1]} if found[0].get(path) != found[1].get(path))
    if differing:
        raise ValueError(f"matching: {first.name} and {other.name} differ in {', '.join(differing)}")


def _seen_data(config: Config) -> dict[str, Any]:
    """All that decides on samples, their order, the steps and where training starts."""
    values = to_dict(config)
    for source in values["data"]["sources"].values():
        del source["text_loss"], source["visual_loss"]
    train = {name: values["train"][name] for name in ("num_steps", "global_batch_rows", "num_replicates")}
    return {name: values[name] for name in ("data", "scene_world", "init_from", "seed")} | {"train": train}


def _check_equal_cost(first: Planned, other: Planned, cost: Callable[[Config], float], what: str) -> None:
    own, theirs = cost(first.config), cost(other.config)
    if abs(own - theirs) > MATCHED_WITHIN * own:
        raise ValueError(
            f"matching: {first.name} has {own:.6g} {what}, {other.name} {theirs:.6g}: more than "
            f"{MATCHED_WITHIN:.0%} apart"
        )
