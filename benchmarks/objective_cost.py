"""What an objective costs: FLOPs and step time against `understanding`, model `100m1`.

    python -m benchmarks.objective_cost [--rounds=5] [--arms ARM ...] [--out=FILE]

A row of T=512 holds an image that is read and one that is drawn, and text. Every arm runs beside a baseline that has
the same frozen components, in turn, two processes at a time; its figure is the median over rounds of the ratio within
a round. FLOPs are those of `flops.model_flops`. Needs an otherwise idle machine; CPU only.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import train_step
from benchmarks.interleave import Worker, interleaved, serve
from benchmarks.results_file import describe_run, write_results
from unihetero_jax import flops
from unihetero_jax.config import Config
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece, assemble_row, stack_rows

MODEL = "100m1"
STEPS_PER_ROUND = 2
MIN_ROUNDS = 5
"""Fewer give no verdict."""

_PLAIN: dict[str, Any] = {"target": "stop_gradient", "cut_input_gradient": False}
_EMA: dict[str, Any] = {"target": "ema", "cut_input_gradient": False}
ARMS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "semantic_input, encoder frozen": ("semantic_input", ("encoder",), _PLAIN),
    "semantic_input, inputs cut": (
        "semantic_input", (), {"target": "stop_gradient", "cut_input_gradient": True},
    ),
    "semantic_input, EMA": ("semantic_input", (), _EMA),
    "semantic_encoder, EMA": ("semantic_encoder", (), _EMA),
    "patch, EMA": ("patch", (), _EMA),
    "pixels": ("pixels", (), _PLAIN),
    "pixel_through": ("pixel_through", (), _PLAIN),
    "pixel_detached": ("pixel_detached", (), _PLAIN),
    "unihetero, EMA": ("unihetero", (), _EMA),
}  # fmt: skip
"""Arm -> objective, frozen components, and what differs in `loss`."""

BARS = {
    "semantic_input, encoder frozen": 1.05, "semantic_input, inputs cut": 1.05, "semantic_input, EMA": 1.12,
}  # fmt: skip
"""Most that a step may take of the baseline's time."""


def make_config(objective: str, frozen: tuple[str, ...], changes: Mapping[str, Any]) -> Config:
    """The model of `train_step` under an objective."""
    config = train_step.make_config(MODEL, "float32")
    return dataclasses.replace(
        config,
        objective=objective,  # pyright: ignore[reportArgumentType]
        loss=dataclasses.replace(config.loss, **changes),
        optimizer=dataclasses.replace(config.optimizer, frozen=frozen),
    )


def make_arrays(vocab_size: int) -> dict[str, np.ndarray]:
    """One full row: image, then text; text, then an image that it asks for."""
    row_tokens, side, patch = train_step.ROW_TOKENS, train_step.IMAGE_SIDE, train_step.PATCH
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    start, end = TokenPiece([train_step.BOI], True), TokenPiece([train_step.EOI], True)
    num_text = row_tokens - 2 * (train_step.PATCHES // 4 + 2)
    tokens = rng.integers(train_step.FIRST_TOKEN, vocab_size, num_text).tolist()
    read = PackedSample([start, ImagePiece(pictures[0]), end, TokenPiece(tokens[: num_text // 2], True)], 0, 1)
    drawn = PackedSample([TokenPiece(tokens[num_text // 2 :], True), start, ImagePiece(pictures[1], True), end], 0, 2)
    row = assemble_row([read, drawn], row_tokens, 2 * train_step.PATCHES, patch, train_step.PAD)
    assert (row["segment_ids"] > 0).all() and row["visual_loss_mask"].sum() == train_step.PATCHES // 4
    return stack_rows([row])


def model_flops(config: Config) -> dict[str, float]:
    """Of a step on the row."""
    arrays = make_arrays(config.model.decoder.vocab_size)
    return flops.model_flops(config, flops.count_work(config, arrays))


def serve_arm(name: str) -> None:
    """A worker process: an arm, or `baseline of` one."""
    objective, frozen, changes = ARMS[name.removeprefix("baseline of ")]
    config = make_config(objective, frozen, changes)
    if name.startswith("baseline of "):
        config = make_config("understanding", frozen, {})
    run, facts = train_step.make_jax_run(config, make_arrays(config.model.decoder.vocab_size))
    run(1)
    serve(run, facts)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """An arm and its baseline in turn."""
    workers: list[Worker] = []
    try:
        for one in (name, f"baseline of {name}"):
            workers.append(Worker(one, ["benchmarks.objective_cost", f"--worker={one}"], STEPS_PER_ROUND))
        facts = {worker.name: worker.facts for worker in workers}
        load_before = os.getloadavg()
        timings = interleaved(workers, rounds, lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True))
    finally:
        for worker in workers:
            worker.close()
    own, base = timings[name], timings[f"baseline of {name}"]
    ratios = [a / b for a, b in zip(own.seconds, base.seconds, strict=True)]
    return {
        "time_ratio": statistics.median(ratios), "time_ratios": ratios,
        "arm": own.to_json(), "baseline": base.to_json(),
        "parameters": facts[name]["parameters"], "load_average": {"before": load_before, "after": os.getloadavg()},
    }  # fmt: skip


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="; ".join(ARMS)
    )
    parser.add_argument("--out", default="benchmarks/results/objective_cost.json")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve_arm(flags.worker)
        return
    about = describe_run(("jax", "jaxlib", "flax", "optax"))
    results = {}
    print(f"{'objective':<34}{'FLOPs':>8}{'step time':>11}{'bar':>7}")
    for name in flags.arms:
        objective, frozen, changes = ARMS[name]
        own = model_flops(make_config(objective, frozen, changes))
        base = model_flops(make_config("understanding", frozen, {}))
        found = {"flops_ratio": own["total"] / base["total"], "flops": own} | measure(name, flags.rounds)
        results[name] = found | {"bar": BARS.get(name)}
        bar = f"{BARS[name]:.2f}" if name in BARS else "-"
        print(f"{name:<34}{found['flops_ratio']:>8.3f}{found['time_ratio']:>11.3f}{bar:>7}", flush=True)
    write_results(flags.out, about, {"model": MODEL, "rounds": flags.rounds, "results": results})


if __name__ == "__main__":
    main()
