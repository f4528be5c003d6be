"""What every file in `benchmarks/results/` says of itself, and how it is written."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def describe_run(packages: Iterable[str]) -> dict[str, Any]:
    """What a reader needs to judge a figure; taken before the measurement, so that its load is that of others."""
    return {
        "machine": machine_facts(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": {"before": os.getloadavg()},
    }


def write_results(out: str | Path, run: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Writes `run` (of `describe_run`), the load of now beside it, and `content`; says where."""
    load = run["load_average"] | {"after": os.getloadavg()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**run, "load_average": load, **content}, indent=1) + "\n")
    print(f"written to {out}")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
