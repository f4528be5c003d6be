"""Temporary memory of the train step: the text loss at a large vocabulary, and what recomputing saves.

    python -m benchmarks.memory [--rounds=9] [--parts=vocabulary,speed,remat] [--out=FILE]
    python -m benchmarks.memory --table

Memory is XLA's own figure for the compiled step on this machine's CPU, `temp_size_in_bytes`: all that it allocates
beside arguments and results. It is exact, whatever else the machine does; the times need an idle one.

vocabulary: the model `tiny1` of `benchmarks/train_step.py`, 8 rows of 512, at 8k and 152k tokens, with
`loss.text_chunk` of 128 and with the plain loss that keeps all logits. speed: both losses in turn where both fit, every
position a target. remat: 12 encoder and 12 decoder layers of small width, with a moving average,
`model.encoder.remat` by `model.decoder.remat`; and 4 + 4 layers, which are unrolled. `--table` prints the tables of
`docs/memory.md` from the results.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import train_step
from benchmarks.interleave import Timing
from benchmarks.results_file import describe_run, write_results
from unihetero_jax import objectives, sharding, step
from unihetero_jax.config import Config, Remat
from unihetero_jax.model.layers import UNROLL_UP_TO
from unihetero_jax.state import TrainState

RESULTS = "benchmarks/results/memory.json"
VOCABULARIES = (8192, 152064)
SPEED_VOCABULARIES = (8192, 32768)
CHUNK = 128
GROWTH_BAR, GROWTH_AIM, SPEED_BAR = 1.5, 1.2, 0.95
"""Most growth of temporary memory from the small to the large vocabulary; least speed against the plain loss."""
MIN_ROUNDS = 9
POLICIES: tuple[Remat, ...] = typing.get_args(Remat)
DEPTHS = {"12 + 12 layers": 12, "4 + 4 layers, unrolled": 4}

Compiled = Callable[[TrainState, Any], Any]


def plain_nll(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`text_loss.text_nll` as one would write it first: all logits at one time."""
    mask = mask.at[:, 0].set(False)
    table = unembedding.astype(hidden.dtype)
    logits = jnp.einsum("btd,vd->btv", hidden[:, :-1], table, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    nll = jnp.where(mask, -jnp.pad(picked, ((0, 0), (1, 0))), 0.0)
    return jnp.sum(nll), jax.lax.stop_gradient(nll)


@contextlib.contextmanager
def text_loss(kind: str) -> Iterator[None]:
    """What is traced inside has the chunked or the plain text loss."""
    with mock.patch.object(objectives, "text_nll", plain_nll) if kind == "plain" else contextlib.nullcontext():
        yield


def vocabulary_config(vocab_size: int, rows: int) -> Config:
    """`tiny1` with another vocabulary; objective `understanding`."""
    config = train_step.make_config("tiny1", "float32")
    decoder = dataclasses.replace(config.model.decoder, vocab_size=vocab_size)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=decoder),
        loss=dataclasses.replace(config.loss, text_chunk=CHUNK),
        train=dataclasses.replace(config.train, global_batch_rows=rows),
    )


def remat_config(num_layers: int, encoder: Remat, decoder: Remat) -> Config:
    """Narrow and deep, objective `semantic_input`: the encoder runs once more, for the targets, without a gradient."""
    config = train_step.make_config("tiny1", "float32")
    model = dataclasses.replace(
        config.model,
        encoder=dataclasses.replace(
            config.model.encoder, num_layers=num_layers, dim=96, num_heads=3, mlp_dim=384, remat=encoder
        ),
        decoder=dataclasses.replace(
            config.model.decoder, num_layers=num_layers, dim=128, num_heads=4, num_kv_heads=2, mlp_dim=384,
            vocab_size=512, remat=decoder,
        ),
    )  # fmt: skip
    train = dataclasses.replace(config.train, global_batch_rows=4)
    return dataclasses.replace(config, objective="semantic_input", model=model, train=train)


def compile_step(config: Config, all_targets: bool = False) -> tuple[Any, Callable[[], TrainState], Any]:
    """The compiled step, what makes a state for it, and its batch: one row of `benchmarks/train_step.py`, repeated."""
    mesh = sharding.make_mesh(config.mesh)
    arrays = train_step.make_arrays(min(config.model.decoder.vocab_size, VOCABULARIES[0]))
    arrays = {name: np.repeat(value, config.train.global_batch_rows, axis=0) for name, value in arrays.items()}
    if all_targets:
        arrays["text_loss_mask"] = np.ones_like(arrays["text_loss_mask"])
    batch = sharding.to_global(arrays, mesh)
    compiled = step.compile_train_step(config, mesh).lower(step.abstract_state(config, mesh), batch).compile()
    return compiled, lambda: step.init_state(config, mesh), batch


def temporary_bytes(compiled: Any) -> int:
    """What the compiled program allocates beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def measure_vocabulary() -> dict[str, Any]:
    """Temporary bytes at both vocabularies with both losses. Nothing is run."""
    found: dict[str, Any] = {"rows": 8, "row_tokens": train_step.ROW_TOKENS, "chunk": CHUNK, "bar": GROWTH_BAR}
    for kind in ("chunked", "plain"):
        sizes = []
        for vocab_size in VOCABULARIES:
            say(f"vocabulary: {kind}, {vocab_size:,} tokens")
            with text_loss(kind):
                sizes.append(temporary_bytes(compile_step(vocabulary_config(vocab_size, found["rows"]))[0]))
        found[kind] = {
            "temp_bytes": dict(zip(map(str, VOCABULARIES), sizes, strict=True)),
            "growth": sizes[1] / sizes[0],
        }
    growth = found["chunked"]["growth"]
    return found | {"bar_reached": growth <= GROWTH_BAR, "aim": GROWTH_AIM, "aim_reached": growth <= GROWTH_AIM}


def measure_speed(rounds: int) -> dict[str, Any]:
    """Seconds of a step with both losses, in turn; the ratio is above 1 where the chunked one is faster."""
    found = {}
    for vocab_size in SPEED_VOCABULARIES:
        config, programs = vocabulary_config(vocab_size, 2), {}
        for kind in ("chunked", "plain"):
            with text_loss(kind):
                programs[kind] = compile_step(config, all_targets=True)
        timings = interleaved(programs, rounds, f"speed at {vocab_size:,} tokens")
        ratio = timings["plain"].median / timings["chunked"].median
        has_verdict = rounds >= MIN_ROUNDS and not any(timing.is_rejected for timing in timings.values())
        found[str(vocab_size)] = {name: timing.to_json() for name, timing in timings.items()} | {
            "rows": 2, "ratio": ratio, "bar": SPEED_BAR, "bar_reached": ratio >= SPEED_BAR if has_verdict else None,
        }  # fmt: skip
    return found


def measure_remat(rounds: int) -> dict[str, Any]:
    """Temporary bytes and seconds of a step for every pair of policies; unrolled, for equal ones."""
    found = {}
    for name, num_layers in DEPTHS.items():
        programs = {}
        for encoder, decoder in itertools.product(POLICIES, POLICIES):
            if num_layers <= UNROLL_UP_TO and encoder != decoder:
                continue
            say(f"remat: {name}, encoder {encoder}, decoder {decoder}")
            programs[f"{encoder}, {decoder}"] = compile_step(remat_config(num_layers, encoder, decoder))
        timings = interleaved(programs, rounds, f"remat {name}")
        found[name] = {
            pair: {"temp_bytes": temporary_bytes(programs[pair][0])} | timing.to_json()
            for pair, timing in timings.items()
        }
    return found


def interleaved(programs: Mapping[str, Any], rounds: int, what: str) -> dict[str, Timing]:
    """Times a step of each program in turn."""
    states = {name: make_state() for name, (_, make_state, _) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(-1, rounds):  # one to warm up
        for name, (compiled, _, batch) in programs.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(compiled(states[name], batch))
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
        say(f"{what}: round {number + 1}/{rounds}, load average {os.getloadavg()[0]:.2f}")
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def page(content: Mapping[str, Any]) -> str:
    """The tables of `docs/memory.md`, in Markdown."""
    results, machine = content["results"], content["machine"]
    vocabulary, lines = results["vocabulary"], []
    small, large = map(str, VOCABULARIES)
    lines += [
        f"On {machine['cores']} cores of {machine['cpu']}, jax {content['versions']['jax']}, {content['time'][:10]}.",
        "",
        f"Temporary memory of the step by text loss, {vocabulary['rows']} rows of {vocabulary['row_tokens']} tokens:",
        "",
        "| text loss | vocabulary 8k | 152k | growth |",
        "|---|---|---|---|",
    ]
    for kind, label in (("chunked", f"chunks of {vocabulary['chunk']}"), ("plain", "all logits at one time")):
        sizes = vocabulary[kind]["temp_bytes"]
        growth = f"{vocabulary[kind]['growth']:.2f}x, {_mib(sizes[large] - sizes[small])}"
        lines.append(f"| {label} | {_mib(sizes[small])} | {_mib(sizes[large])} | {growth} |")
    table = _mib(VOCABULARIES[1] * train_step.MODELS["tiny1"]["decoder"]["dim"] * 4)
    lines += ["", f"The gradient of the table of embeddings alone has {table} at 152k."]
    lines += ["", "Speed of the step with chunks over that without, every position a target:", ""]
    for vocab_size, speed in results["speed"].items():
        busy = " (the machine was not idle: no verdict)" if speed["bar_reached"] is None else ""
        lines.append(f"- {int(vocab_size):,} tokens: {speed['ratio']:.2f}x{busy}")
    for name, pairs in results["remat"].items():
        base = pairs["none, none"]
        lines += ["", f"Recomputing, {name}: temporary memory, and time of a step against `none` for both:", ""]
        lines += ["| `model.encoder.remat` | `model.decoder.remat` | memory | time |", "|---|---|---|---|"]
        for pair, cell in pairs.items():
            encoder, decoder = pair.split(", ")
            share = f"{_mib(cell['temp_bytes'])} ({cell['temp_bytes'] / base['temp_bytes']:.0%})"
            busy = " (not idle)" if cell["rejected"] or base["rejected"] else ""
            lines.append(f"| `{encoder}` | `{decoder}` | {share} | {cell['median_s'] / base['median_s']:.2f}x{busy} |")
    return "\n".join(lines) + "\n"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--parts", default="vocabulary,speed,remat", help="others stay as the file has them")
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables of an earlier run")
    flags = parser.parse_args()
    out = Path(flags.out)
    content = json.loads(out.read_text()) if out.exists() else {"results": {}}
    measures = {
        "vocabulary": measure_vocabulary,
        "speed": lambda: measure_speed(flags.rounds),
        "remat": lambda: measure_remat(flags.rounds),
    }
    run = describe_run(("jax", "jaxlib", "flax", "optax"))
    for part in () if flags.table else flags.parts.split(","):
        content = run | {"results": content["results"] | {part: measures[part]()}}
        write_results(out, run, content)
    print(page(content), end="")


if __name__ == "__main__":
    main()
