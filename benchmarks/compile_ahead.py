"""Compiles every size of `experiments/pretrain.py` for every machine, one after another, and prints the table.

    python -m benchmarks.compile_ahead [--sizes=1b,8b] [--topologies=v5e:16x16] [--again] [--table]

Results go to `benchmarks/results/compile_ahead.json` after each compilation; what stands there is not compiled again
without `--again`. `--table` prints the table of that file and compiles nothing. TPU slices need libtpu, `make tpu-aot`;
GPU servers are partitioned on simulated CPU devices, their memory and time are arithmetic ("not compiled").
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.pretrain import SIZES, TARGETS

RESULTS = Path("benchmarks/results/compile_ahead.json")
LIMIT_S = 3600
"""A target that takes longer is recorded as such."""
GIB = 2**30
KEPT = (
    "config", "topology", "status", "message", "remedy", "devices", "mesh", "objective", "attention", "parameters",
    "batch", "state_bytes_per_device", "memory", "collectives", "sent_bytes", "theory", "sent_to_theory",
    "largest_collectives", "stray_gathers", "flops", "roofline", "lower_s", "compile_s", "host_peak_gib", "versions",
)  # fmt: skip


def compile_one(size: str, topology: str) -> dict[str, Any]:
    """The report of one size on one machine."""
    config = f"experiments/pretrain.py:{size}@{topology}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "unihetero_jax", "compile", f"--config={config}", f"--topology={topology}",
            f"--output={output}",
        ]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its compiling process, too
            process.wait()
            return {"config": config, "topology": topology, "status": f"not compiled within {LIMIT_S // 60} minutes"}
        if not output.exists():
            return {"config": config, "topology": topology, "status": "failed"}
        report = json.loads(output.read_text())
    return {key: report[key] for key in KEPT if key in report} | {"wall_s": time.perf_counter() - start}


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Sizes x machines, in Markdown; HBM in GiB of the chip's, collectives in GB that a device sends in a step."""
    lines = [
        "| size | machine | mesh | rows x parts | parameters | status | HBM, GiB | sent, GB (of theory) "
        "| compute / memory / network, ms | MFU bound | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, report in results.items():
        size, _, topology = key.partition("@")
        if "memory" not in report:
            lines.append(f"| {size} | {topology} | | | | {report['status']} | | | | | |")
            continue
        mesh = " x ".join(f"{name} {n}" for name, n in report["mesh"].items() if n > 1)
        batch, memory, line = report["batch"], report["memory"], report["roofline"]
        times = " / ".join(f"{1e3 * line[f'{name}_s']:.0f}" for name in ("compute", "memory", "network"))
        ratio = f" ({report['sent_to_theory']:.2f})" if report["sent_to_theory"] else ""
        seconds = report["lower_s"] + report["compile_s"]
        lines.append(
            f"| {size} | {topology} | {mesh} | {batch['rows']} x {batch['accumulation_steps']} | "
            f"{report['parameters']['total'] / 1e9:.2f}B | {report['status']} | {memory['total'] / GIB:.1f} of "
            f"{memory['available'] / GIB:.1f} | {report['sent_bytes'] / 1e9:.1f}{ratio} | {times} | "
            f"{line['mfu_bound']:.2f} | {seconds:.0f} s, {report['host_peak_gib']:.1f} GiB |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compiles what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(name for name in SIZES if name != "debug"))
    parser.add_argument("--topologies", default=",".join(TARGETS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not flags.table:
        for size in flags.sizes.split(","):
            for topology in flags.topologies.split(","):
                key = f"{size}@{topology}"
                if flags.again or results.get(key, {}).get("status", "failed") == "failed":
                    print(f"\n== {key}", flush=True)
                    results[key] = compile_one(size, topology)
                    ordered = {k: results[k] for k in sorted(results, key=_order)}
                    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    print(format_table({k: results[k] for k in sorted(results, key=_order)}))
    return 0


def _order(key: str) -> tuple[int, int]:
    size, _, topology = key.partition("@")
    machines = list(TARGETS)
    return list(SIZES).index(size), machines.index(topology) if topology in machines else len(machines)


if __name__ == "__main__":
    sys.exit(main())
