"""Loading a language model of a billion parameters: import against transformers' `from_pretrained`, seconds and memory.

    make parity && .venv-parity/bin/python -m benchmarks.pretrained_loading [--rounds=5] [--folder=runs/one-billion]

The model is Llama-shaped and random, stored in bfloat16 in files of 1 GB; both load it as float32. Every load has a
process of its own, imports before the clock starts, and the arms take turns. A virtual machine may have given its free
memory back to its host, and then takes seconds for each GiB, whoever asks for it; so before each clock another process
touches more memory than either arm needs, and ends. Memory is the peak of resident memory above that of the process
before it; what is above the parameters themselves is the loader's.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.interleave import Timing
from benchmarks.results_file import describe_run, write_results
from unihetero_jax.safetensors_files import INDEX, NewTensor, file_name, split_by_bytes, write_tensors

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
CONFIG: dict[str, Any] = SHAPE | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "max_position_embeddings": 8192, "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}  # fmt: skip
ARMS = ("import", "transformers")
MAX_OVERHEAD_GIB = 1.0
"""Bar: beside the model at most this and 1.2 times the largest tensor."""

WARM_BYTES = 14 * 2**30
"""Twice the peak of either arm: not all that is touched comes back first."""


def write_model(folder: Path) -> None:
    """The random model, once."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dim, key_dim, mlp = SHAPE["hidden_size"], 8 * 64, SHAPE["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SHAPE["vocab_size"], dim),
        "model.norm.weight": (dim,),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (dim, dim), f"{name}.self_attn.k_proj.weight": (key_dim, dim),
            f"{name}.self_attn.v_proj.weight": (key_dim, dim), f"{name}.self_attn.o_proj.weight": (dim, dim),
            f"{name}.mlp.gate_proj.weight": (mlp, dim), f"{name}.mlp.up_proj.weight": (mlp, dim),
            f"{name}.mlp.down_proj.weight": (dim, mlp), f"{name}.input_layernorm.weight": (dim,),
            f"{name}.post_attention_layernorm.weight": (dim,),
        }  # fmt: skip
    dtype = np.dtype(ml_dtypes.bfloat16)
    groups = split_by_bytes([NewTensor(name, shape, dtype) for name, shape in shapes.items()], 10**9)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = file_name(number, len(groups))
        values = ((t.name, (rng.standard_normal(t.shape, np.float32) * 0.02).astype(dtype)) for t in group)
        write_tensors(folder / name, group, values, {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@dataclasses.dataclass(frozen=True)
class Load:
    """One load: seconds, parameters, a checksum, and resident bytes before it."""

    seconds: float
    parameters: int
    checksum: float
    resident_before: int


def load_by_import(folder: Path) -> Load:
    """As `import-hf` reads it, into arrays on the default device."""
    import jax
    from flax import nnx

    from experiments import base
    from unihetero_jax.config_reading import from_config_dict
    from unihetero_jax.hf_weights import language_table, load_parameters, open_source
    from unihetero_jax.model.unihetero import abstract_model
    from unihetero_jax.pretrained import read_pretrained

    jax.devices()
    _take_memory_from_the_host()
    before, start = _resident(), time.perf_counter()
    values = base.get_config().to_dict()
    language = read_pretrained(str(folder), "", values).language
    assert language is not None
    values["model"]["decoder"] = dataclasses.asdict(language.decoder)
    config = from_config_dict(values)
    abstract = nnx.to_pure_dict(abstract_model(config.model, "understanding")[1])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    params = load_parameters(open_source(folder, language_table(config.model.decoder), target), target)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    count = sum(x.size for x in jax.tree.leaves(params))
    return Load(seconds, count, float(np.asarray(params["decoder"]["norm"]["gain"]).sum()), before)


def load_by_transformers(folder: Path) -> Load:
    """The same by the library that the files are made for."""
    import torch
    import transformers

    load = transformers.LlamaForCausalLM.from_pretrained
    _take_memory_from_the_host()
    before, start = _resident(), time.perf_counter()
    model = load(folder, dtype=torch.float32)
    seconds = time.perf_counter() - start
    count = sum(p.numel() for p in model.parameters())
    return Load(seconds, count, model.model.norm.weight.detach().sum().item(), before)


def _take_memory_from_the_host() -> None:
    touch = f"import mmap; m = mmap.mmap(-1, {WARM_BYTES}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS);"
    touch += f"m.madvise(mmap.MADV_HUGEPAGE); [m.__setitem__(i, 1) for i in range(0, {WARM_BYTES}, 4096)]"
    subprocess.run([sys.executable, "-c", touch], check=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_arm(arm: str, folder: Path) -> None:
    """In a process of its own: prints one JSON line."""
    done = load_by_import(folder) if arm == "import" else load_by_transformers(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - done.resident_before
    print(json.dumps(dataclasses.asdict(done) | {"peak_bytes": peak}))


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/one-billion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS, default=None, help="one load, for the program itself")
    parser.add_argument("--out", default="benchmarks/results/pretrained_loading.json")
    flags = parser.parse_args()
    folder = Path(flags.folder)
    if flags.arm:
        run_arm(flags.arm, folder)
        return
    about = describe_run(("jax", "jaxlib", "torch", "transformers", "safetensors"))
    write_model(folder)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(flags.rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            command = [sys.executable, "-m", "benchmarks.pretrained_loading", f"--arm={arm}", f"--folder={folder}"]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
            )
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {number + 1}/{flags.rounds}, load average {os.getloadavg()[0]:.2f}", file=sys.stderr)
    facts = {(one["parameters"], round(one["checksum"], 3)) for each in found.values() for one in each}
    assert len(facts) == 1, f"the arms loaded different models: {facts}"
    ((parameters, _),) = facts
    timings = {arm: Timing(tuple(one["seconds"] for one in each)) for arm, each in found.items()}
    peaks = {arm: max(one["peak_bytes"] for one in each) for arm, each in found.items()}
    largest = 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    bound = 4 * parameters + 1.2 * largest + MAX_OVERHEAD_GIB * 2**30
    for arm in ARMS:
        note = "  REJECTED: the machine was not quiet" if timings[arm].is_rejected else ""
        print(f"{arm:14}{timings[arm].median:7.2f} s  {peaks[arm] / 2**30:6.2f} GiB{note}")
    ratio = timings["transformers"].median / timings["import"].median
    print(f"{parameters / 1e9:.2f}B parameters, {4 * parameters / 2**30:.2f} GiB; import is {ratio:.2f}x as fast")
    beside, bar = ((x - 4 * parameters) / 2**30 for x in (peaks["import"], bound))
    print(f"memory beside the model {beside:.2f} GiB, bar {bar:.2f}")
    write_results(flags.out, about, {
        "parameters": parameters, "largest_tensor_bytes": largest, "ratio": ratio, "bound_bytes": bound,
        "bar_reached": ratio >= 1 and peaks["import"] <= min(bound, peaks["transformers"]),
        "arms": {arm: timings[arm].to_json() | {"peak_bytes": peaks[arm]} for arm in ARMS},
    })  # fmt: skip


if __name__ == "__main__":
    main()
