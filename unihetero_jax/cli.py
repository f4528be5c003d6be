"""The commands: train, evaluate, score, compare, verify-claims, generate, data-stats, checkpoints, compile, explain."""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import base as base_experiment
from unihetero_jax import (
    claims,
    compile_ahead,
    data_stats,
    distributed,
    explain,
    export,
    job_array,
    preregistration,
    report,
    run_report,
    stored_steps,
    sweep,
    sweep_plan,
)
from unihetero_jax.checkpoint import SaveError
from unihetero_jax.command_line import load_experiment, parse_arguments, parse_config_flags, with_overrides
from unihetero_jax.data.records import RecordError, format_prompt, probe_image
from unihetero_jax.evaluate_run import evaluate_command
from unihetero_jax.evaluation import comparison, official
from unihetero_jax.evaluation.drawings import default_grid, draw_from_texts, reconstruct
from unihetero_jax.evaluation.runner import (
    SCORERS,
    write_json,
)
from unihetero_jax.evaluation.sheet import draw_pictures
from unihetero_jax.hf_config import VISION_CLASSES
from unihetero_jax.hf_export import export_hugging_face
from unihetero_jax.hf_import import import_pretrained
from unihetero_jax.inference.generate import Prompt, generate_text
from unihetero_jax.inference.sampling import Sampling
from unihetero_jax.loaded_run import Run, load_run
from unihetero_jax.metrics import announce
from unihetero_jax.profiling import parse_range
from unihetero_jax.storage import StorageError, read_bytes, to_path
from unihetero_jax.train import Interrupted
from unihetero_jax.train_run import run_training
from unihetero_jax.watchdog import EXIT_STALLED
from unihetero_jax.workdir import write_atomically

EXIT_BAD_INPUT = 2
"""Exit code when the message says what to change; an interrupted run exits with 128 + the signal's number."""
EXIT_FAILED_RUNS = 1
"""Exit code of `sweep` when a run failed; the same command tries it again."""
EXIT_WITHHELD = 1
"""Exit code of `verify-claims` when a planted control came out wrong, so that no verdict is given."""
EXIT_STORAGE = 74
"""Exit code when storage failed, or a save: start it again (EX_IOERR of sysexits.h)."""
EXIT_PROCESSES_MISSING = 76
"""Exit code when not all processes of the run came: start it again. After a stall, or the loss of one, it is
`watchdog.EXIT_STALLED`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    try:
        namespace, overrides = parse_arguments(_parser(), sys.argv[1:] if arguments is None else arguments)
        if getattr(namespace, "distributed", "off") == "auto":
            address, number = namespace.coordinator_address, namespace.num_processes
            cluster = distributed.find_cluster(address, number, namespace.process_id)
            distributed.connect(cluster, namespace.startup_deadline)
        return namespace.command(namespace, overrides) or 0
    except Interrupted as stop:
        announce(str(stop))
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError, distributed.StartupError, distributed.LostProcess) as error:
        if os.environ.get("UNIHETERO_TRACEBACK"):  # where a message is not enough
            raise
        of_many = f"process {distributed.process_id()}: " if distributed.num_processes() > 1 else ""
        print(f"error: {of_many}{error}", file=sys.stderr)
        return _exit_code(error)
    finally:
        distributed.disconnect()


def _exit_code(error: Exception) -> int:
    match error:
        case distributed.StartupError():
            return EXIT_PROCESSES_MISSING
        case distributed.LostProcess():
            return EXIT_STALLED
        case StorageError() | SaveError():
            return EXIT_STORAGE
    return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unihetero_jax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        required=True,
        metavar="train|evaluate|score|compare|generate|data-stats|checkpoints|import-hf|export-hf|compile|explain",
    )

    trains = commands.add_parser("train", allow_abbrev=False, help="train, or go on training, the run in a workdir")
    trains.add_argument("--config", required=True, help="experiments/x.py[:argument]; fields by --config.a.b=value")
    trains.add_argument("--workdir", required=True)
    trains.add_argument(
        "--change-mixture", action="store_true", help="go on from a checkpoint of another data.sources, where each was"
    )
    trains.add_argument("--profile", default="", help="START:STOP: first and last step of a trace in WORKDIR/profile")
    trains.set_defaults(command=_train)

    evaluates = commands.add_parser("evaluate", allow_abbrev=False, help="score a run's checkpoint on benchmarks")
    evaluates.add_argument(
        "--benchmarks", default="", help="names from eval.benchmarks or paths, by comma; all if empty"
    )
    evaluates.add_argument("--mode", choices=tuple(SCORERS), default="likelihood", help="; ".join(
        f"{mode}: {words}" for mode, words in SCORERS.items()))  # fmt: skip
    evaluates.add_argument("--without-image", action="store_true", help="also score with the image left out")
    evaluates.add_argument("--steps", default="last", help="last, best (least validation loss), all, or by comma")
    evaluates.add_argument(
        "--watch", type=float, default=0.0, metavar="SECONDS",
        help="beside a training run: look for new checkpoints so often, until the last one",
    )  # fmt: skip
    evaluates.add_argument("--max-new-tokens", type=int, default=32, help="generation: of an answer")
    evaluates.add_argument(
        "--training-prior", type=int, default=0, metavar="RECORDS",
        help="also what the answers of training alone say, from so many records of each source",
    )  # fmt: skip
    evaluates.add_argument("--held-out", action="store_true", help="also perplexity of every source's validation text")
    evaluates.add_argument("--rollout", action="store_true", help="also draw from captions of eval.rollout_source")
    evaluates.add_argument(
        "--rollout-judge", default="", metavar="WORKDIR",
        help="also the error of rollouts by position, in the space of that run's encoder (experiments/scene_judge.py)",
    )  # fmt: skip
    evaluates.add_argument(
        "--drawings", type=int, default=None, metavar="N",
        help="also draw N captions and compare the pictures with true ones: Frechet distance, precision and recall in "
        "the space of the judge's encoder, or of its own",
    )  # fmt: skip
    evaluates.add_argument(
        "--layers", action="store_true",
        help="also, layer by layer: conflict of the losses' gradients, what stays of the image, linear probes",
    )  # fmt: skip
    evaluates.add_argument(
        "--probe-images", default="", metavar="PATH",
        help="with --layers: also probe classes of pictures, a folder for each class or a parquet file (CIFAR-10)",
    )  # fmt: skip
    evaluates.set_defaults(command=evaluate_command)

    scores = commands.add_parser("score", allow_abbrev=False, help="score anybody's predictions by the public rules")
    scores.add_argument("--benchmark", required=True, choices=tuple(official.BENCHMARKS), metavar="NAME",
                        help=", ".join(official.BENCHMARKS))  # fmt: skip
    scores.add_argument("--questions", default="", help="the benchmark's own file, with the right answers")
    scores.add_argument("--predictions", required=True, help=".tsv or .xlsx of VLMEvalKit, .json or .jsonl")
    scores.add_argument("--rule", default="", help="whose: " + "; ".join(
        f"{name}: {', '.join(scorer.rules)}" for name, scorer in official.BENCHMARKS.items()))  # fmt: skip
    scores.add_argument("--output", default="", help="a JSON file for the figures and every item")
    scores.set_defaults(command=_score)

    compares = commands.add_parser("compare", allow_abbrev=False, help="whether two runs differ on what both answered")
    compares.add_argument("run_a", metavar="RUN_A", help="WORKDIR, or WORKDIR@STEP")
    compares.add_argument("run_b", metavar="RUN_B")
    compares.add_argument("--mode", choices=tuple(SCORERS), default="likelihood")
    compares.add_argument("--output", default="", help="a JSON file for the rows of the table")
    compares.set_defaults(command=_compare)

    verifies = commands.add_parser("verify-claims", allow_abbrev=False, help="verdicts on claims from a table of runs")
    verifies.add_argument("--results", required=True, metavar="TABLE",
                          help="Parquet or CSV; a row for each run and metric: arm, seed, metric, value")  # fmt: skip
    verifies.add_argument("--protocol", default="", metavar="FILE",
                          help="what was fixed before the runs; default: protocol.json beside the table")  # fmt: skip
    verifies.add_argument("--output", default="", help="a JSON file for everything that is printed")
    verifies.set_defaults(command=_verify_claims)

    reports = commands.add_parser("report", allow_abbrev=False, help="a page of what a run or a sweep found")
    chosen = reports.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--workdir", default="", help="of a sweep or of a run")
    chosen.add_argument("--results", default="", metavar="TABLE", help="of a sweep, as `verify-claims` takes it")
    reports.add_argument("--against", default="", metavar="WORKDIR", help="of a run: another, drawn over it")
    reports.add_argument("--protocol", default="", metavar="FILE", help="default: protocol.json beside the table")
    reports.add_argument("--title", default="", help="of the page; default: the folder")
    reports.add_argument("--output", default="", help="an HTML file; default: report.html in the folder")
    reports.set_defaults(command=_report)

    sweeps = commands.add_parser("sweep", allow_abbrev=False, help="train what is missing of many runs")
    sweeps.add_argument("--sweep", default="", metavar="FILE[:SCALE]", help="BASE and sweep(scale): experiments/sweeps")
    sweeps.add_argument(
        "--config", default="", metavar="FILE[:ARG]",
        help="instead: an experiment, and fields with several values, such as --config.seed=0,1,2",
    )  # fmt: skip
    sweeps.add_argument("--workdir", required=True)
    sweeps.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")
    sweeps.add_argument(
        "--pilot", default="", metavar="TABLE",
        help="with --dry-run: results of the baselines alone, to say which difference the planned seeds can show",
    )  # fmt: skip
    sweeps.add_argument(
        "--launcher", choices=("local", "slurm", "jobset"), default="local",
        help="local: here, one after another; else an array of the missing runs, and the command that submits it",
    )  # fmt: skip
    sweeps.add_argument("--submit", action="store_true", help="with --launcher=slurm or jobset: also submit the array")
    sweeps.set_defaults(command=_sweep)

    generates = commands.add_parser("generate", allow_abbrev=False, help="continue a prompt, with or without an image")
    generates.add_argument("--image", default="", help="an image file")
    generates.add_argument("--prompt", default="", help="words to go on from, or to draw")
    generates.add_argument("--num-images", type=int, default=0, help="draw so many images of the prompt instead")
    generates.add_argument("--grid", type=_grid, default=None, metavar="HxW", help="of the images, in visual tokens")
    generates.add_argument("--reconstruct", nargs="+", default=[], metavar="FILE", help="draw images from themselves")
    generates.add_argument("--output", default="", metavar="FILE.png", help="the sheet of what was drawn")
    generates.add_argument("--max-new-tokens", type=int, default=64)
    generates.add_argument("--temperature", type=float, default=0.0)
    generates.add_argument("--top-p", type=float, default=1.0)
    generates.add_argument("--seed", type=int, default=0)
    generates.add_argument("--step", type=int, default=-1, help="-1: the newest that verifies")
    generates.set_defaults(command=_generate)
    stats = commands.add_parser("data-stats", allow_abbrev=False, help="what a mixture holds, what a run drew of it")
    chosen = stats.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--workdir", default="", help="a run: also what it has drawn")
    chosen.add_argument("--config", default="", help="an experiment that has not run yet")
    stats.set_defaults(command=_data_stats)
    stored = commands.add_parser("checkpoints", allow_abbrev=False, help="list, verify, compare, prune, export steps")
    stored.add_argument("action", choices=("list", "verify", "diff", "prune", "export"))
    stored.add_argument("--workdir", required=True)
    stored.add_argument("--steps", type=_steps, default=(), help="verify: those, by comma (all if empty); diff: two")
    stored.add_argument("--keep-last", type=int, default=3, help="prune: so many of the newest")
    stored.add_argument("--keep-every", type=int, default=0, help="prune: and every step divisible by this")
    stored.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    stored.add_argument("--step", type=int, default=-1, help="export: which; -1: the newest that verifies")
    stored.add_argument("--output", default="", help="export: folder for safetensors files, config and tokenizer")
    stored.add_argument("--ema", action="store_true", help="export: the moving averages, where a component has one")
    stored.add_argument("--replicate", type=int, default=0, help="export: which model of a run with several")
    stored.add_argument("--dtype", default="", help="export: float32 or bfloat16; as stored if left out")
    stored.add_argument("--tokenizer", default="", help="export: the run's tokenizer, if it is no longer where it was")
    stored.add_argument("--max-file-gb", type=float, default=export.MAX_FILE_BYTES / 1e9, help="export: of one file")
    stored.set_defaults(command=_checkpoints)
    imports = commands.add_parser("import-hf", allow_abbrev=False, help="a first checkpoint from pretrained models")
    where = "folder with config.json and *.safetensors, or owner/name@revision of the Hugging Face hub"
    imports.add_argument("--language-model", default="", help=f"Qwen2, Qwen3, Llama, SmolLM2: {where}")
    imports.add_argument("--vision-encoder", default="", help="SigLIP, SigLIP 2, CLIP: likewise")
    imports.add_argument("--workdir", required=True)
    imports.add_argument("--config", default="", help="experiment for all but the architecture; the defaults if empty")
    imports.set_defaults(command=_import_hf)
    exports = commands.add_parser("export-hf", allow_abbrev=False, help="folders that transformers loads")
    exports.add_argument("--workdir", required=True)
    exports.add_argument("--output", required=True)
    exports.add_argument("--step", type=int, default=-1, help="-1: the newest that verifies")
    exports.add_argument("--ema", action="store_true", help="the moving averages, where a component has one")
    exports.add_argument("--replicate", type=int, default=0, help="which model of a run with several")
    exports.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    exports.add_argument("--vision-family", choices=tuple(VISION_CLASSES), default=None, help="default: as imported")
    exports.add_argument("--original-vocabulary", action="store_true", help="without this program's special tokens")
    exports.add_argument("--pretrained", default="", metavar="WORKDIR", help="import that the run started from")
    exports.add_argument("--max-file-gb", type=float, default=export.MAX_FILE_BYTES / 1e9)
    exports.set_defaults(command=_export_hf)
    compile_ahead.add_parser(commands)
    explain.add_parser(commands)
    for command in (trains, evaluates):
        processes = command.add_argument_group("several processes", "found by themselves on Slurm, GKE and Cloud TPU")
        processes.add_argument(
            "--distributed", choices=("auto", "off"), default="auto", help="off: one process, whatever the machine says"
        )
        processes.add_argument("--coordinator_address", default="", help="HOST:PORT of process 0")
        processes.add_argument("--num_processes", type=int, default=0)
        processes.add_argument("--process_id", type=int, default=-1)
        processes.add_argument(
            "--startup_deadline", type=float, default=distributed.STARTUP_DEADLINE_S,
            help="seconds within which all processes have to come (default: %(default).0f)",
        )  # fmt: skip
    for command in (evaluates, generates):
        command.add_argument("--workdir", required=True)
        command.add_argument("--replicate", type=int, default=0, help="which model of a run with num_replicates > 1")
    return parser


def _train(flags: argparse.Namespace, overrides: list[str]) -> None:
    config = parse_config_flags(flags.config, overrides)
    profile = parse_range(flags.profile, config.train.num_steps)
    run_training(config, flags.workdir, change_mixture=flags.change_mixture, profile=profile)


def _score(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: score takes no --config fields")
    result = official.score_predictions(flags.benchmark, flags.questions, flags.predictions, flags.rule)
    print(official.format_score(result))
    if flags.output:
        write_json(to_path(flags.output), result)


def _compare(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: compare takes no --config fields")
    rows = comparison.compare_runs(flags.run_a, flags.run_b, flags.mode)
    unlike = comparison.unlike_runs(flags.run_a, flags.run_b)
    print(comparison.format_differences(rows, flags.run_a, flags.run_b, unlike))
    if flags.output:
        found = {"differences": [dataclasses.asdict(row) for row in rows], "unlike": unlike}
        write_json(to_path(flags.output), found)


def _verify_claims(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Returns 0, or `EXIT_WITHHELD` where no verdict is given."""
    if overrides:
        raise ValueError(f"{overrides[0]}: verify-claims takes no --config fields")
    results = Path(flags.results)
    table = claims.read_table(results)
    registered = claims.read_protocol(Path(flags.protocol or results.parent / "protocol.json"))
    findings = claims.verify(table, registered.protocol)
    gate = claims.missed_gate(table, findings, registered.protocol.gate)
    print(claims.format_findings(findings, registered, gate))
    if flags.output:
        write_json(to_path(flags.output), claims.to_json(findings, registered, gate))
    return EXIT_WITHHELD if claims.why_withheld(findings, registered, gate) else 0


def _report(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: report takes no --config fields")
    workdir = to_path(flags.workdir)
    table = to_path(flags.results or workdir / sweep.RESULTS)
    if flags.results or table.exists():
        if flags.against:
            raise ValueError(f"--against={flags.against} is drawn over a run; a sweep's page has its own baselines")
        _report_sweep(flags, Path(table))
        return
    if flags.protocol:
        raise ValueError(f"--protocol={flags.protocol} is of a sweep, and {workdir} is a run; leave it out")
    output = to_path(flags.output or workdir / "report.html")
    write_atomically(output, run_report.render_run(workdir, flags.title or f"Run {workdir}", flags.against))
    print(f"see {output}")


def _report_sweep(flags: argparse.Namespace, results: Path) -> None:
    found, protocol = claims.read_table(results), results.parent / preregistration.PROTOCOL_FILE
    has_none = not flags.protocol and not protocol.exists()
    registered = claims.without_protocol(found) if has_none else claims.read_protocol(Path(flags.protocol or protocol))
    findings, gate, unjudged = [], "", ""
    try:
        findings = claims.verify(found, registered.protocol)
        gate = claims.missed_gate(found, findings, registered.protocol.gate)
    except ValueError as error:  # arms and curves stand without verdicts
        unjudged = str(error)
        print(f"no verdicts: {error}")
    output, title = (
        Path(flags.output or results.with_name("report.html")),
        flags.title or f"Sweep {results.parent.name}",
    )
    is_sweeps = results.name == sweep.RESULTS
    training = run_report.curves_of_sweep(results.parent, sweep.run_names(results)) if is_sweeps else ""
    output.write_text(report.render(found, registered, findings, gate, title, unjudged, training))
    print(f"see {output}")


def _sweep(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Returns 0, or `EXIT_FAILED_RUNS` where a run failed."""
    if bool(flags.sweep) == bool(flags.config):
        raise ValueError("sweep: give --sweep=FILE[:SCALE], or --config=FILE with fields of several values")
    if flags.sweep and overrides:
        raise ValueError(f"{overrides[0]}: a sweep file says all fields itself; change it, or leave --sweep out")
    planned = sweep_plan.plan_file(flags.sweep) if flags.sweep else sweep_plan.plan_product(flags.config, overrides)
    workdir = Path(flags.workdir)
    if flags.submit and flags.launcher == "local":
        raise ValueError("--submit is for --launcher=slurm or jobset; name one, or leave --submit out")
    if flags.pilot and not flags.dry_run:
        raise ValueError(f"--pilot={flags.pilot} is for --dry-run, which trains nothing; add it, or leave --pilot out")
    protocol = sweep_plan.protocol_of(flags.sweep, planned) if flags.sweep else None
    if protocol:
        preregistration.check_matching(planned, protocol)
    if flags.dry_run:
        print(sweep.describe(planned, workdir, _power(flags.pilot, protocol)))
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    if flags.sweep:
        preregistration.register(flags.sweep, planned, workdir)
    if flags.launcher != "local":
        _launch(flags, planned, workdir)
        return 0
    counts = sweep.execute(planned, workdir)
    print(f"{len(planned)} runs: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    print(f"see {workdir / sweep.RESULTS}")
    return EXIT_FAILED_RUNS if counts["failed"] else 0


def _power(pilot: str, protocol: claims.Protocol | None) -> str:
    """What a pilot's noise lets the planned seeds see."""
    if protocol is None:
        if pilot:
            raise ValueError(f"--pilot={pilot}: the sweep has no PROTOCOL whose metric it could be asked for")
        return ""
    if not pilot:
        return "smallest detectable difference: unknown without --pilot=TABLE (runs of the baselines)"
    return claims.format_pilot(claims.read_pilot(claims.read_table(Path(pilot)), protocol), protocol)


def _launch(flags: argparse.Namespace, planned: list[sweep_plan.Planned], workdir: Path) -> None:
    """The missing runs as an array: written, and submitted if asked for."""
    base = sweep_plan.base_of(flags.sweep) if flags.sweep else flags.config
    lines = sweep.override_lines(planned, load_experiment(base), workdir)
    if not lines:
        print(f"no run of {workdir} is missing")
        return
    command = job_array.write_array(flags.launcher, lines, base, workdir)
    print(f"{len(lines)} runs are missing: {workdir / job_array.OVERRIDES}, for --config={base}")
    print(job_array.submit(command) if flags.submit else shlex.join(command))
    print("afterwards the same sweep command without --launcher writes the table")


def _generate(flags: argparse.Namespace, overrides: list[str]) -> None:
    run = load_run(flags.workdir, flags.step, flags.replicate, overrides)
    if flags.num_images or flags.reconstruct:
        _draw(flags, run)
        return
    image = _read_image(flags.image) if flags.image else None
    if not image and not format_prompt(flags.prompt):
        raise ValueError("--prompt is empty and there is no --image: nothing to continue")
    sampling = Sampling(flags.temperature, flags.top_p)
    prompts = [Prompt(flags.prompt, (image,) if image else ())]
    print(generate_text(run.config, run.params, run.tokenizer, prompts, flags.max_new_tokens, sampling, flags.seed)[0])


def _grid(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give height and width in visual tokens, such as 3x3")
    return int(parts[0]), int(parts[1])


def _draw(flags: argparse.Namespace, run: Run) -> None:
    """A sheet of images drawn from the prompt, of the given images beside what is drawn from them, or of both."""
    if not flags.output.endswith(".png"):
        raise ValueError(f"--output {flags.output!r}: name the PNG file that the images are written to")
    if flags.num_images < 0 or (flags.num_images and not flags.prompt):
        raise ValueError("--num-images: a positive number of images, and --prompt says of what")
    rows: list[tuple[str, list[np.ndarray]]] = []
    if flags.num_images:
        grid = flags.grid or default_grid(run.config)
        texts = [flags.prompt] * flags.num_images
        start = time.monotonic()
        rows.append((flags.prompt, draw_from_texts(run.config, run.params, run.tokenizer, texts, grid, flags.seed)))
        seconds, tokens = time.monotonic() - start, flags.num_images * grid[0] * grid[1]
        print(f"{tokens} visual tokens in {seconds:.1f} s with compilation ({tokens / seconds:.0f} a second)")
    if flags.reconstruct:
        files = [_read_image(path) for path in flags.reconstruct]
        pairs = reconstruct(run.config, run.params, run.tokenizer, files, flags.seed)
        rows.append(("as the model sees it", [seen for seen, _ in pairs]))
        rows.append(("drawn from that", [drawn for _, drawn in pairs]))
    draw_pictures(rows, Path(flags.output))
    print(flags.output)


def _data_stats(flags: argparse.Namespace, overrides: list[str]) -> None:
    if flags.config:
        config = parse_config_flags(flags.config, overrides)
    else:
        step, totals = data_stats.last_totals(flags.workdir)
        config = with_overrides(json.loads(read_bytes(to_path(flags.workdir) / "config.json")), overrides)
    lengths, costs = data_stats.mixture_lengths(config)
    print(data_stats.format_lengths(lengths))
    if flags.workdir:
        print(f"\ndrawn up to step {step}:\n{data_stats.format_totals(totals, lengths)}")
    sizes, proposed = data_stats.row_sizes(costs, config.data.row_tokens)
    print("\n" + data_stats.format_row_sizes(sizes, proposed, config))


def _steps(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: give steps by comma, such as 100,200")
    return tuple(map(int, text.split(",")))


def _checkpoints(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: checkpoints takes no --config fields")
    match flags.action:
        case "list":
            print(stored_steps.format_steps(stored_steps.describe_steps(flags.workdir)))
        case "verify":
            faults = stored_steps.verify_steps(flags.workdir, flags.steps)
            for step, fault in faults.items():
                print(f"step {step}: {fault or 'every file matches its digest'}")
            if damaged := [str(step) for step, fault in faults.items() if fault]:
                raise ValueError(f"damaged: step {', '.join(damaged)}; a restore passes over them")
        case "diff":
            if len(flags.steps) != 2:
                raise ValueError("checkpoints diff: name two steps, such as --steps=100,200")
            print(stored_steps.format_differences(*stored_steps.compare_steps(flags.workdir, *flags.steps)))
        case "prune":
            gone = stored_steps.prune_steps(flags.workdir, flags.keep_last, flags.keep_every, flags.dry_run)
            print(f"{len(gone)} steps {'would be ' if flags.dry_run else ''}removed")
        case "export":
            if not flags.output:
                raise ValueError("checkpoints export: name a folder to write, such as --output=exported")
            export.export_parameters(
                flags.workdir, flags.step, flags.output, flags.ema, flags.replicate, flags.dtype, flags.tokenizer,
                int(flags.max_file_gb * 1e9),
            )  # fmt: skip


def _import_hf(flags: argparse.Namespace, overrides: list[str]) -> None:
    base = load_experiment(flags.config) if flags.config else base_experiment.get_config().to_dict()
    import_pretrained(
        flags.language_model, flags.vision_encoder, flags.workdir, base,
        lambda values: with_overrides(values, overrides),
    )  # fmt: skip
    print(f"{flags.workdir}: a run of 0 steps; go on by init_from.workdir={flags.workdir}, or try `generate`")


def _export_hf(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: export-hf takes no --config fields")
    export_hugging_face(
        flags.workdir, flags.step, flags.output, averaged=flags.ema, replicate=flags.replicate, dtype=flags.dtype,
        family=flags.vision_family, original_vocabulary=flags.original_vocabulary, pretrained=flags.pretrained,
        max_file_bytes=int(flags.max_file_gb * 1e9),
    )  # fmt: skip


def _read_image(path: str) -> bytes:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--image {path}: no such file")
    data = file.read_bytes()
    try:
        probe_image(data)
    except RecordError as error:
        raise ValueError(f"--image {path}: {error}") from error
    return data
