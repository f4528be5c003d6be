"""One process of a run that only loads: real `jax.distributed`, the real mesh, the batch hash that training reports.

python -m tests.loader_process FOLDER --process=I --processes=N --port=P --steps=A:B [--threads=T] [--save-every=K]

FOLDER holds config.json; hashes.jsonl gets a line per step, state.json the position, both from process 0.
"""

import argparse
import json
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.mixture import make_train_iterator, merge_positions
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.sharding import local_rows, make_mesh, to_global
from unihetero_jax.step import batch_hash


def main() -> None:
    """Loads the steps asked for, from the saved position if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("process", "processes", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--last", type=int, required=True, help="step to end at")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=10)
    flags = parser.parse_args()
    if flags.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{flags.port}", flags.processes, flags.process)
    values = json.loads((flags.folder / "config.json").read_text())
    values["data"]["num_threads"] = flags.threads
    config = from_config_dict(values)
    mesh = make_mesh(config.mesh)
    rows = local_rows(mesh, config.train.global_batch_rows)
    stream = make_train_iterator(config, load_tokenizer(config.data.tokenizer), rows)
    hash_of = jax.jit(batch_hash)
    state_path, done = flags.folder / "state.json", 0
    if state_path.exists():
        state = json.loads(state_path.read_text())
        done = state["batch"]
        stream.set_state({"position": np.asarray(state["position"]), "batch": done})
    while done < flags.last:
        batch = to_global(next(stream).arrays, mesh)
        low, high = (int(half) for half in np.asarray(jax.device_get(hash_of(batch))))
        done += 1
        if flags.process == 0:
            with (flags.folder / "hashes.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, "hash": high << 32 | low}) + "\n")
        if done % flags.save_every == 0 or done == flags.last:
            mine = stream.get_state()["position"]
            everyones = np.asarray(multihost_utils.process_allgather(mine)).reshape(flags.processes, *mine.shape)
            if flags.process == 0:
                partial = state_path.with_suffix(".partial")
                partial.write_text(json.dumps({"position": merge_positions(list(everyones)).tolist(), "batch": done}))
                os.replace(partial, state_path)
            multihost_utils.sync_global_devices(f"saved {done}")
    stream.close()


if __name__ == "__main__":
    main()
