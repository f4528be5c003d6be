"""`compile`: the real train step, compiled for a machine that is not here: does it fit, what does it send, how fast?

For TPU slices this needs libtpu, whose compiler runs on any CPU. It is large and belongs to no run, so it lives in a
folder of its own (`make tpu-aot`) that only the compiling process sees; that process, started by `compile`, also has
jax on CPUs and no metadata server. No data is read: shapes alone matter.

`cpu:N` compiles for N simulated CPU devices, `gpu` for the devices of this machine. A GPU server by name (`8xH100`) can
be compiled nowhere else: it is partitioned on as many CPU devices, which shows the collectives; memory and time are
then arithmetic, and the report says "not compiled".
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unihetero_jax import hlo
from unihetero_jax.arrays import Batch
from unihetero_jax.command_line import parse_config_flags
from unihetero_jax.config import Config, ConfigError
from unihetero_jax.flops import model_flops, padded_work, parameter_counts
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import choose_backend
from unihetero_jax.roofline import expected_traffic, make_roofline, memory_estimate, network_seconds
from unihetero_jax.sharding import batch_sharding, bytes_per_device, make_mesh
from unihetero_jax.step import abstract_state, compile_train_step
from unihetero_jax.topology import CHIPS, GIB, Topology, check_mesh, parse_topology

LIBTPU = "0.0.42.1"
"""The compiler for TPUs of the pinned jax (its extra `tpu` names it); also in pyproject.toml, extra `tpu-aot`."""
LIBTPU_FOLDER, LIBTPU_VARIABLE = ".tpu-aot", "UNIHETERO_LIBTPU"
COMPILER_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_spmd_threshold_for_allgather_cse": "1000000",
}
"""Of TPUs, as in `experiments/launch/tpu.env`. A gathered weight multiplied piece by piece as it arrives would send the
same bytes, but take long to compile and hide in the text what is gathered; asynchronous all-gathers overlap as well. A
weight gathered to repeat a layer is kept for that layer's gradients, however far apart the two uses are."""
STRAY_BYTES = 2**20
"""Smaller gathers than this (statistics, masks) are not asked where they come from."""
MAX_RECOMPILATIONS = 3
TEXT_LOSS_LOOP = "shard_map/while"
"""The one loop of the step that stops by its data, as its operation is named."""


class TooBig(Exception):
    """The program does not fit the device's memory; `message` is the compiler's."""


def add_parser(commands: Any) -> None:
    """Adds `compile` to the command line's sub-parsers."""
    parser = commands.add_parser("compile", allow_abbrev=False, help="compile the step for a machine that is not here")
    parser.add_argument("--config", required=True, help="experiments/x.py[:argument]; fields by --config.a.b=value")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p-128, 8xH100, cpu:8, gpu, ...")
    parser.add_argument("--output", default="", help="a file for the report as JSON")
    parser.add_argument("--libtpu", default="", help=f"folder with libtpu (default: {LIBTPU_FOLDER})")
    parser.add_argument("--no-search", action="store_true", help="too big: do not compile smaller settings")
    parser.set_defaults(command=compile_command)


def compile_command(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks the request, compiles in a process of its own, prints the table and writes the JSON.

    Raises:
        ValueError: if the machine, the configuration or libtpu is wrong, or the program does not fit.
    """
    topology = parse_topology(flags.topology)
    check_mesh(parse_config_flags(flags.config, overrides), topology)
    folder = find_libtpu(flags.libtpu) if topology.platform == "tpu" else None
    request = {
        "config": flags.config, "overrides": list(overrides), "topology": topology.name, "output": flags.output,
        "search": not flags.no_search,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "unihetero_jax.compile_ahead", json.dumps(request | {"dump": dump})]
        code = subprocess.run(command, env=worker_environment(topology, folder, dump)).returncode
    if code == 2:
        raise ValueError(f"{flags.config} was not compiled for {topology.name}; the reason stands above")
    if code:
        raise ValueError(
            f"the compiling process ended with code {code}"
            + ("; it was killed: too little host memory" if code in (-9, 137) else "")
        )


def find_libtpu(flag: str = "") -> str | None:
    """The folder to put on the path for libtpu; None: it is installed with the program.

    Raises:
        ValueError: saying how to install it.
    """
    named = flag or os.environ.get(LIBTPU_VARIABLE, "")
    for folder in [named] if named else [LIBTPU_FOLDER]:
        if (Path(folder) / "libtpu" / "libtpu.so").is_file():
            return str(Path(folder).resolve())
        if named:
            raise ValueError(f"--libtpu={folder}: no libtpu/libtpu.so there; {_how_to_install()}")
    if importlib.util.find_spec("libtpu") is not None:
        return None
    raise ValueError(f"compiling for TPUs needs libtpu, which is not installed; {_how_to_install()}")


def _how_to_install() -> str:
    return (
        f"`make tpu-aot` puts it into {LIBTPU_FOLDER}/ (pip install --no-deps --target={LIBTPU_FOLDER} "
        f"libtpu=={LIBTPU}), or name its folder by --libtpu=DIR or {LIBTPU_VARIABLE}"
    )


def worker_environment(topology: Topology, libtpu: str | None, dump: str) -> dict[str, str]:
    """What the compiling process sees.

    The variables keep libtpu from asking a TPU host's metadata server, and let two compilations run at once: libtpu
    locks a device that these do not have. Its report on memory goes to the folder `dump`.
    """
    environment = dict(os.environ)
    if topology.name != "gpu":
        environment["JAX_PLATFORMS"] = "cpu"
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile time is part of the report
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):  # the report must not depend on the shell that asks for it
        environment.pop(name, None)
    if topology.platform == "tpu":
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }  # fmt: skip
        paths = [libtpu] if libtpu else []
        environment["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=on_mesh"
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    elif topology.name != "gpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.num_devices}"
    return environment


def mesh_of(config: Config, topology: Topology) -> Mesh:
    """The mesh on the machine's devices, which for a TPU slice exist for the compiler only."""
    if topology.platform != "tpu":
        return make_mesh(config.mesh)
    from jax.experimental import topologies

    return make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch."""
    rows, tokens, patches = config.train.global_batch_rows, config.data.row_tokens, config.data.row_patches
    sharding = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    whole, flag = array(jnp.int32, tokens), array(jnp.bool_, tokens)
    pair = array(jnp.int32, patches, 2)
    return Batch(
        tokens=whole, positions=whole, segment_ids=whole, branch_ids=whole, source_ids=whole, text_loss_mask=flag,
        visual_mask=flag, visual_index=whole, visual_loss_mask=flag, boi_grid=array(jnp.int32, tokens, 2),
        patches=array(jnp.uint8, patches, config.model.encoder.patch_size**2 * 3),
        patch_segment_ids=array(jnp.int32, patches), patch_coords=pair, patch_grid=pair,
        row_hash=array(jnp.uint32, 2),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step and what was measured on the way."""

    config: Config
    mesh: Mesh
    text: str
    memory: dict[str, float]
    lower_s: float
    compile_s: float


def compile_step(config: Config, topology: Topology, dump: str = "") -> Compiled:
    """Lowers and compiles the train step.

    Args:
        config: the experiment.
        topology: the machine.
        dump: for TPUs, where XLA was told to dump to; its report on memory is read there and the rest removed.

    Raises:
        TooBig: with the compiler's message.
    """
    mesh = mesh_of(config, topology)
    start = time.perf_counter()
    lowered = compile_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
    lowered_at = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS if topology.platform == "tpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooBig(str(error)) from None
        raise
    compile_s = time.perf_counter() - lowered_at
    found = compiled.memory_analysis()
    memory = {
        "arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }  # fmt: skip
    memory["total"] = found.peak_memory_in_bytes
    if topology.platform == "tpu":
        memory |= _hbm_of_dump(Path(dump), memory)
        available = topology.chip.hbm_bytes if topology.chip else math.inf
        if memory["total"] > available:
            raise TooBig(f"{memory['total'] / GIB:.2f}G of {available / GIB:.2f}G")
    text = compiled.as_text()
    return Compiled(config, mesh, text or "", memory, lowered_at - start, compile_s)


def _hbm_of_dump(dump: Path, memory: Mapping[str, float]) -> dict[str, float]:
    """Temporaries and total in HBM, from the compiler's own report.

    `memory_analysis` adds what lies in the chip's on-core memory (libtpu 0.0.42.1), and that may be most of it.
    """
    reports = sorted(dump.glob("*after_optimizations-memory-usage-report.txt"), key=lambda path: path.stat().st_mtime)
    total = (
        re.search(r"^Memory Space: default .*\nTotal bytes: (\d+)", reports[-1].read_text(), re.M) if reports else None
    )
    if total is None:
        raise ValueError(f"libtpu left no report on memory in {dump}; compile with libtpu=={LIBTPU}")
    for path in dump.iterdir():  # tens of megabytes of text
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    in_hbm = float(total[1])
    return {"temporaries": in_hbm - memory["arguments"], "total": in_hbm + memory["code"]}


def describe(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """The report on a compiled step, as plain values; `format_report` prints it."""
    config, mesh = compiled.config, compiled.mesh
    state = abstract_state(config, mesh)
    named_gpu = topology.platform == "gpu" and topology.name != "gpu"
    target = "gpu" if named_gpu else mesh.devices.flat[0].platform
    backend = choose_backend(config.model.attention_backend, target)
    shapes, axes = state.params, unihetero.logical_axes(config.model, config.objective)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    has_theory = config.mesh.context == 1
    theory = expected_traffic(config, shapes, axes, 4 if on_cpu else None, not on_cpu) if has_theory else None
    collectives = hlo.read_collectives(compiled.text, {TEXT_LOSS_LOOP: text_chunks(config)})
    sent = sum(item.total_sent for item in collectives)
    counts = parameter_counts(config.model, config.objective)
    state_bytes = bytes_per_device(state)
    report: dict[str, Any] = {
        "topology": topology.name, "devices": mesh.size, "mesh": dict(mesh.shape), "objective": config.objective,
        "attention": backend, "parameters": counts,
        "batch": {
            "rows": config.train.global_batch_rows, "row_tokens": config.data.row_tokens,
            "row_patches": config.data.row_patches, "accumulation_steps": config.train.accumulation_steps,
        },
        "state_bytes_per_device": {
            "parameters": bytes_per_device(state.params), "ema": bytes_per_device(state.ema),
            "optimizer": bytes_per_device(state.opt_state), "total": state_bytes,
        },
        "collectives": hlo.totals_by_kind(collectives), "sent_bytes": sent, "theory": theory,
        "sent_to_theory": sent / theory["total"] if theory and theory["total"] else None,
        "largest_collectives": [
            dict(zip(("kind", "op_name", "shapes", "sent_bytes", "runs"), row, strict=True))
            for row in hlo.by_operation(collectives, 12)
        ],
        "stray_gathers": stray_gathers(config, shapes, collectives),
        "flops": {
            "padded": model_flops(config, padded_work(config, config.train.global_batch_rows)),
        },
        "lower_s": compiled.lower_s, "compile_s": compiled.compile_s,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "versions": _versions(topology),
    }  # fmt: skip
    if named_gpu:
        report |= {
            "status": "not compiled", "memory": memory_estimate(config, state_bytes, counts["total"], backend),
        }  # fmt: skip
    else:
        report |= {"status": "fits", "memory": dict(compiled.memory)}
    if topology.chip is not None:
        if named_gpu:  # what the CPU's compiler sends is wider than what a GPU's would
            real = expected_traffic(config, shapes, axes) if has_theory else {"total": sent}
            network_s = real["total"] / topology.chip.link_bandwidth
        else:
            coordinates = [device.coords for device in mesh.devices.flat] if topology.platform == "tpu" else None
            network_s = network_seconds(collectives, topology.chip, coordinates)
        roofline = make_roofline(config, topology.chip, mesh.size, backend, state_bytes, network_s)
        report["roofline"] = dataclasses.asdict(roofline) | {"bound_by": roofline.bound_by}
        report["memory"]["available"] = topology.chip.hbm_bytes
        if named_gpu and report["memory"]["total"] > topology.chip.hbm_bytes:
            report["status"] = "not compiled, too big by arithmetic"
    return report


def text_chunks(config: Config) -> int:
    """Upper bound on the trips of the text loss's loop, the one that stops by its data."""
    positions = config.train.global_batch_rows // config.train.accumulation_steps * config.data.row_tokens
    positions //= config.mesh.data * config.mesh.fsdp * config.mesh.context
    return -(-positions // min(config.loss.text_chunk, positions))


def stray_gathers(config: Config, shapes: Any, collectives: Sequence[hlo.Collective]) -> list[str]:
    """All-gathers that are none of FSDP's own: of something that is no parameter, or over other devices than fsdp."""
    sizes = set()
    for leaf in jax.tree.leaves(shapes):
        for size in (leaf.size, leaf.size // leaf.shape[0]):  # whole, and one layer of a stack
            sizes |= {size, size // config.mesh.tensor}
    strays = []
    for item in collectives:
        if item.kind != "all-gather" or item.array_bytes < STRAY_BYTES:
            continue
        arrays = [
            int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\w\[([\d,]+)\]", item.shapes)
        ]
        if item.group_size != config.mesh.fsdp or not any(size in sizes for size in arrays):
            strays.append(f"{item.shapes} over {item.group_size} devices: {item.op_name}")
    return sorted(set(strays))


def _versions(topology: Topology) -> dict[str, str]:
    versions = {"jax": jax.__version__}
    if topology.platform == "tpu":
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return versions


def smaller_settings(config: Config) -> list[dict[str, Any]]:
    """What to change, mildest first, each on top of the ones before: overrides that lower the memory of a device."""
    steps: list[dict[str, Any]] = []
    remat = {
        f"model.{name}.remat": "full" for name in ("encoder", "decoder") if getattr(config.model, name).remat != "full"
    }
    if remat:
        steps.append(remat)
    row_shards = config.mesh.data * config.mesh.fsdp
    rows = config.train.global_batch_rows // config.train.accumulation_steps // row_shards
    if rows > 1:
        divisor = next(d for d in range(2, rows + 1) if rows % d == 0)
        steps.append({"train.accumulation_steps": config.train.accumulation_steps * divisor})
        if rows > divisor:
            steps.append({"train.accumulation_steps": config.train.accumulation_steps * rows})
    fsdp = config.mesh.data * config.mesh.fsdp
    if config.mesh.data > 1 and config.model.decoder.dim % fsdp == 0 and config.model.encoder.dim % fsdp == 0:
        steps.append({"mesh.data": 1, "mesh.fsdp": fsdp})
    return steps


def _too_big(request: Mapping[str, Any], config: Config, topology: Topology, error: TooBig) -> dict[str, Any]:
    """The report on a step that does not fit: the numbers, and by recompiling, the nearest setting that does."""
    state = bytes_per_device(abstract_state(config, mesh_of(config, topology)))
    sizes = re.findall(r"([\d.]+[KMGT])", str(error))
    needs = f"{sizes[0]} of {sizes[1]}" if len(sizes) >= 2 else str(error).splitlines()[0]
    sentence = (
        f"{request['config']} does not fit {topology.name}: a chip would need {needs} (the state alone is "
        f"{state / GIB:.2f} GiB)."
    )
    remedy, tried, overrides = None, [], list(request["overrides"])
    for changes in smaller_settings(config)[:MAX_RECOMPILATIONS] if request["search"] else []:
        overrides += [f"{name}={value}" for name, value in changes.items()]
        tried = [o for o in overrides if o not in request["overrides"]]
        try:
            compile_step(parse_config_flags(request["config"], overrides), topology, request["dump"])
        except TooBig:
            continue
        except ConfigError:
            break
        remedy = tried
        break
    if remedy:
        sentence += f" Compiled: it fits with {' '.join(f'--config.{change}' for change in remedy)}."
    else:
        also = f"also with {' '.join(tried)}; " if tried else ""
        sentence += f" It does not fit {also}take more chips, rows that are shorter, or mesh.tensor > 1."
    return {"topology": topology.name, "status": "too big", "message": sentence, "remedy": remedy}


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table of two columns and one of collectives."""
    batch, state, memory = report["batch"], report["state_bytes_per_device"], report["memory"]
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "1 device"
    parts = ", ".join(
        f"{name} {value / GIB:.2f}" for name, value in memory.items() if name not in ("total", "available")
    )
    available = f" of {memory['available'] / GIB:.2f}" if "available" in memory else ""
    lines = [
        f"machine         {report['topology']}, {report['devices']} devices: {mesh}",
        f"batch           {batch['rows']} rows of {batch['row_tokens']} positions, {batch['row_patches']} patches, in "
        f"{batch['accumulation_steps']} part(s); attention {report['attention']}",
        f"parameters      {report['parameters']['total'] / 1e9:.3f} billion",
        f"state, GiB      {state['total'] / GIB:.3f} a device: parameters {state['parameters'] / GIB:.3f}, optimizer "
        f"{state['optimizer'] / GIB:.3f}, average {state['ema'] / GIB:.3f}",
        f"memory, GiB     {memory['total'] / GIB:.2f}{available}: {parts} ({report['status']})",
        f"compiled in     {report['lower_s']:.0f} + {report['compile_s']:.0f} s, host memory "
        f"{report['host_peak_gib']:.1f} GiB",
        "",
        "collectives, bytes that a device sends in a step",
    ]
    for kind, entry in report["collectives"].items():
        lines.append(f"  {kind:<20}{entry['sent_bytes'] / 1e9:10.3f} GB {entry['runs']:8.0f} runs")
    theory = report["theory"]
    if theory:
        terms = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in theory.items() if name != "total")
        share = f", {report['sent_to_theory']:.3f} of theory" if report["sent_to_theory"] else ""
        lines.append(f"  {'all':<20}{report['sent_bytes'] / 1e9:10.3f} GB{share} {theory['total'] / 1e9:.3f} ({terms})")
    lines += [f"  not of FSDP: all-gather {text}" for text in report["stray_gathers"]]
    if "roofline" in report:
        line = report["roofline"]
        lines += [
            "",
            f"FLOPs, T        {line['model_flops'] / 1e12:.1f} a device, executed {line['executed_flops'] / 1e12:.1f}",
            f"roofline, ms    compute {1e3 * line['compute_s']:.1f}, memory {1e3 * line['memory_s']:.1f}, network "
            f"{1e3 * line['network_s']:.1f}: bound by {line['bound_by']}",
            f"MFU bound       {line['mfu_bound']:.3f}",
        ]
    return "\n".join(lines)


def main(request: Mapping[str, Any]) -> int:
    """The compiling process: report on stdout and, if asked, as JSON. Exit code 2: what to change stands in stderr."""
    try:
        topology = parse_topology(request["topology"])
        config = parse_config_flags(request["config"], request["overrides"])
        if topology.name == "gpu":
            if jax.default_backend() != "gpu":
                raise ValueError("--topology=gpu: jax sees no GPU here; name a server, such as 8xH100")
            kind = jax.devices()[0].device_kind
            chip = next((c for c in CHIPS.values() if c.platform == "gpu" and c.name in kind), None)
            topology = dataclasses.replace(topology, shape=(len(jax.devices()),), chip=chip)
        check_mesh(config, topology)
        try:
            report = describe(compile_step(config, topology, request["dump"]), topology)
            print(format_report(report))
        except TooBig as error:
            report = _too_big(request, config, topology, error)
            print(report["message"], file=sys.stderr)
        report = {"config": request["config"], "overrides": request["overrides"]} | report
        if request["output"]:
            Path(request["output"]).parent.mkdir(parents=True, exist_ok=True)
            Path(request["output"]).write_text(json.dumps(report, indent=1) + "\n")
        return 2 if report["status"] == "too big" else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
