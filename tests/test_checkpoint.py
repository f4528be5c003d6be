"""Checkpoints: whole or absent, verified, and restorable onto any mesh."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.base import get_config
from unihetero_jax.arrays import pytree_dataclass
from unihetero_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    check_config,
    check_data,
    list_steps,
    restore_subtree,
)
from unihetero_jax.config import to_dict
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.integrity import verify
from unihetero_jax.storage import to_path


@pytree_dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple


def make_config(**fields):
    config = get_config()
    config.data.sources = {"scenes": {"path": "data/scenes", "weight": 1.0, "augment": "none"}}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return from_config_dict(config)


def make_state(step, width=3):
    """A small state whose every value depends on the step; bfloat16, containers of several kinds, an empty one."""
    params = {
        "encoder": {"kernel": jnp.arange(4.0 * width).reshape(4, width) * 1.1 + step},
        "decoder": {"blocks": {"scale": jnp.full((2, 5), 0.3 + step, jnp.bfloat16)}},
    }
    moments = optax.adamw(1e-3).init(params)
    return State(jnp.int32(step), params, {}, moments)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def position_of(step):
    return {"position": np.arange(6, dtype=np.int64).reshape(3, 2) * 2**40 + step}


def write_steps(workdir, steps, config=None):
    checkpointer = Checkpointer(workdir, config or make_config())
    for step in steps:
        checkpointer.save(step, make_state(step), position_of(step))
    checkpointer.close()


def restore_newest(workdir, config=None, messages=None):
    checkpointer = Checkpointer(
        workdir, config or make_config(), report=(messages if messages is not None else []).append
    )
    try:
        return checkpointer.restore(abstract(make_state(0)))
    finally:
        checkpointer.close()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with complete steps 100 and 200; tests damage copies of it."""
    workdir = tmp_path_factory.mktemp("two-steps")
    write_steps(workdir, [100, 200])
    return workdir


@pytest.fixture
def copied(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "copy")


def test_round_trip_is_exact(two_steps):
    step, state, position = restore_newest(two_steps)
    assert step == 200
    assert_same(state, make_state(200))
    np.testing.assert_array_equal(position["position"], position_of(200)["position"])
    assert position["position"].dtype == np.int64


def test_nothing_saved_yet_is_none(tmp_path):
    assert restore_newest(tmp_path) is None
    assert list_steps(tmp_path) == []


def test_named_step(two_steps):
    checkpointer = Checkpointer(two_steps, make_config())
    step, state, _ = checkpointer.restore(abstract(make_state(0)), step=100)
    assert step == 100
    assert_same(state, make_state(100))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 150; there are \[100, 200\]"):
        checkpointer.restore(abstract(make_state(0)), step=150)
    checkpointer.close()


def test_python_and_numpy_scalars_keep_their_kind(tmp_path):
    state = {"params": {"w": jnp.ones(2)}, "count": 7, "rate": 0.1, "table": np.arange(3, dtype=np.int16)}
    checkpointer = Checkpointer(tmp_path, make_config())
    checkpointer.save(1, state, {}, wait=True)
    _, restored, position = checkpointer.restore({**state, "count": 0, "rate": 0.0})
    checkpointer.close()
    assert (restored["count"], restored["rate"], position) == (7, 0.1, {})
    assert type(restored["count"]) is int and restored["table"].dtype == np.int16


def test_values_are_those_at_the_time_of_the_call(tmp_path):
    """The step that follows donates the state's memory while the save is still being written."""
    grow = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = jnp.arange(2_000_000, dtype=jnp.float32)
    expected = np.array(x)
    checkpointer = Checkpointer(tmp_path, make_config())
    checkpointer.save(1, {"params": {"x": x}}, {})
    for _ in range(20):
        x = grow(x)
    x.block_until_ready()
    _, restored, _ = checkpointer.restore({"params": {"x": abstract(x)}})
    checkpointer.close()
    np.testing.assert_array_equal(restored["params"]["x"], expected)


@pytest.mark.parametrize("seed", range(30))
def test_any_flipped_bit_is_found_and_the_previous_step_used(copied, seed):
    chance = random.Random(seed)
    path = chance.choice([path for path in files_of(copied / "checkpoints" / "200") if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    messages = []
    step, state, _ = restore_newest(copied, messages=messages)
    assert step == 100
    assert_same(state, make_state(100))
    relative = str(path.relative_to(copied / "checkpoints" / "200"))
    assert any("checkpoint 200 is damaged" in message and relative in message for message in messages)
    # The next start does not stumble over it again, and the step can be written anew.
    checkpointer = Checkpointer(copied, make_config())
    assert checkpointer.all_steps() == [100]
    checkpointer.restore(abstract(make_state(0)))
    checkpointer.save(200, make_state(200), position_of(200), wait=True)
    assert checkpointer.all_steps() == [100, 200]
    checkpointer.close()


def corrupted(data, chance):
    """The bytes after a fault of storage: a flipped bit, a block of zeros or of noise, or a cut."""
    place, changed = chance.randrange(len(data)), bytearray(data)
    match chance.choice(("flip", "zeros", "noise", "cut")):
        case "flip":
            changed[place] ^= 1 << chance.randrange(8)
        case "zeros":
            changed[place : place + 4096] = bytes(len(data[place : place + 4096]))
        case "noise":
            changed[place : place + 512] = chance.randbytes(len(data[place : place + 512]))
        case "cut":
            del changed[place:]
    return bytes(changed)


@pytest.mark.slow
def test_no_corruption_of_500_is_restored_silently(tmp_path):
    """8 MB of parameters; the faults are spread over the bytes of all files, small files included."""
    checkpointer = Checkpointer(tmp_path, make_config())
    states = {step: {"params": {"w": jnp.asarray(np.random.default_rng(step).normal(size=2_000_000), jnp.float32)}}
              for step in (100, 200)}  # fmt: skip
    for step, state in states.items():
        checkpointer.save(step, state, position_of(step), wait=True)
    checkpointer.close()
    folder, chance, num_faults = tmp_path / "checkpoints" / "200", random.Random(0), 0
    paths = [path for path in files_of(folder) if path.stat().st_size]
    sizes = [path.stat().st_size for path in paths]
    while num_faults < 500:
        path = chance.choices(paths, sizes)[0] if chance.random() < 0.5 else chance.choice(paths)
        sound = path.read_bytes()
        faulty = corrupted(sound, chance)
        if faulty == sound:
            continue
        num_faults += 1
        path.write_bytes(faulty)
        reader = Checkpointer(tmp_path, make_config(), report=lambda _: None)
        step, state, _ = reader.restore(abstract(states[100]))
        reader.close()
        assert step == 100, path
        if num_faults % 50 == 0:
            assert_same(state, states[100])
        (aside,) = tmp_path.glob("checkpoints/damaged-200-*")
        aside.rename(folder)
        (folder / "damaged.json").unlink()
        path.write_bytes(sound)
    reader = Checkpointer(tmp_path, make_config(), report=lambda _: None)
    step, state, _ = reader.restore(abstract(states[200]))
    reader.close()
    assert step == 200
    assert_same(state, states[200])


@pytest.mark.parametrize("damage", ["truncate", "delete", "zero"])
def test_every_lost_file_is_found(two_steps, tmp_path, damage):
    names = [path.relative_to(two_steps) for path in files_of(two_steps / "checkpoints" / "200")]
    for number, name in enumerate(name for name in names if name.name != "manifest.json"):
        if (two_steps / name).stat().st_size == 0 and damage != "delete":
            continue
        workdir = shutil.copytree(two_steps, tmp_path / str(number))
        path = workdir / name
        size = path.stat().st_size
        match damage:
            case "truncate":
                os.truncate(path, size // 2 if size > 1 else 0)
            case "delete":
                path.unlink()
            case "zero":
                path.write_bytes(path.read_bytes()[:-1] + b"\0" if path.read_bytes()[-1:] != b"\0" else b"\1" * size)
        step, state, _ = restore_newest(workdir)
        assert step == 100
        assert_same(state, make_state(100))
        shutil.rmtree(workdir)


def test_step_without_manifest_does_not_exist(copied):
    (copied / "checkpoints" / "200" / "manifest.json").unlink()
    assert list_steps(copied) == [100]
    assert restore_newest(copied)[0] == 100
    assert not (copied / "checkpoints" / "200").exists()  # removed as a leftover


@pytest.mark.parametrize("damage", ["flip", "manifests", "folders"])
def test_never_a_silent_restart_when_all_is_lost(copied, damage):
    for step in (100, 200):
        folder = copied / "checkpoints" / str(step)
        match damage:
            case "flip":
                path = next(path for path in files_of(folder) if path.name == "_METADATA")
                path.write_bytes(b"x" + path.read_bytes()[1:])
            case "manifests":
                (folder / "manifest.json").unlink()
            case "folders":
                shutil.rmtree(folder)
    for _ in range(2):  # the second start must not take what the first set aside for an empty workdir
        with pytest.raises(CheckpointError, match="none is valid, and the run will not silently start again"):
            restore_newest(copied)


def test_damaged_named_step_is_refused_with_its_file(copied):
    (copied / "checkpoints" / "200" / "state" / "_METADATA").write_bytes(b"{}")
    checkpointer = Checkpointer(copied, make_config())
    with pytest.raises(CheckpointError, match="checkpoint 200 is damaged: file state/_METADATA has 2 bytes"):
        checkpointer.restore(abstract(make_state(0)), step=200)
    checkpointer.close()


def test_verification_can_be_turned_off(copied):
    """Then nothing is read: an equal number of other bytes passes, a shorter file does not."""
    (path,) = (p for p in files_of(copied / "checkpoints" / "200" / "metadata") if p.name == "metadata")
    sound, config = path.read_bytes(), make_config(**{"checkpoint.verify_digests": False})
    path.write_bytes(sound.replace(b'"python": "3', b'"python": "9'))
    assert path.read_bytes() != sound
    assert restore_newest(copied, config)[0] == 200
    path.write_bytes(sound[:-1])
    messages = []
    assert restore_newest(copied, config, messages)[0] == 100
    assert any("metadata/metadata has" in message for message in messages)


def test_a_step_with_digests_of_the_former_hash_is_verified_with_it(copied):
    for step, damaged in ((200, True), (100, False)):
        folder = copied / "checkpoints" / str(step)
        content = json.loads((folder / "manifest.json").read_text())["content"]
        assert content.pop("hash") == "xxh3_128"
        for name, entry in content["files"].items():
            entry["digest"] = hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
        text = json.dumps(content, indent=1, sort_keys=True)
        own = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        text = json.dumps({"content": content, "digest": own}, indent=1, sort_keys=True)
        (folder / "manifest.json").write_text(text + "\n")
        path = folder / "state" / "_METADATA"
        assert verify(to_path(folder)) is None
        if damaged:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert restore_newest(copied)[0] == 100


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"), [(1, 0, [7]), (2, 0, [6, 7]), (2, 3, [3, 6, 7]), (9, 0, list(range(1, 8)))]
)
def test_retention(tmp_path, keep_last, keep_every, expected):
    config = make_config(**{"checkpoint.keep_last": keep_last, "checkpoint.keep_every_steps": keep_every})
    write_steps(tmp_path, range(1, 8), config)
    assert list_steps(tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [*map(str, expected), "completed.json"]


def test_non_finite_parameters_are_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path, make_config())
    checkpointer.save(1, make_state(1), position_of(1))
    state = make_state(2)
    bad = state.params["decoder"]["blocks"]["scale"].at[1, 2].set(jnp.nan)
    state.params["decoder"]["blocks"]["scale"] = bad
    with pytest.raises(CheckpointError, match="params/decoder/blocks/scale holds NaN"):
        checkpointer.save(2, state, position_of(2))
    assert checkpointer.all_steps() == [1]
    checkpointer.close()


@pytest.mark.parametrize("restored", [True, False])
def test_the_first_save_of_a_run_compiles_nothing(tmp_path, caplog, restored):
    """The check of the parameters is compiled from the moment that a run asks for its state, beside other things."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    width = 11 if restored else 12  # shapes that no other test has compiled
    state = jax.device_put(
        {"params": {"a": np.ones((3, width), np.float32), "b": np.ones(width, np.float32)}}, sharding
    )
    checkpointer = Checkpointer(tmp_path, make_config())
    if restored:
        assert checkpointer.restore(abstract(state)) is None
        checkpointer._compiling.result()
    with jax.log_compiles():
        checkpointer.save(1, state, {})
    assert (
        any("Compiling" in record.message and "_all_finite" in record.message for record in caplog.records) != restored
    )
    checkpointer.close()


@pytest.fixture
def full_disk():
    """A context in which the disk is full, as a limit on the size of files: small files fit, arrays do not."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


BIG = {"params": {"x": np.random.default_rng(0).standard_normal(300_000).astype(np.float32)}}


def test_failure_in_the_background_surfaces_once_and_later_saves_work(tmp_path, full_disk):
    big = jax.tree.map(jnp.asarray, BIG)
    checkpointer = Checkpointer(tmp_path, make_config())
    checkpointer.save(1, big, {}, wait=True)
    with full_disk(), pytest.raises(CheckpointError, match=r"saving checkpoint 2 failed.*checkpoints are untouched"):
        checkpointer.save(2, big, {})
        checkpointer.wait()
    assert checkpointer.all_steps() == [1]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "completed.json"}
    checkpointer.save(2, big, {}, wait=True)
    checkpointer.check()
    assert checkpointer.all_steps() == [1, 2]
    checkpointer.close()


@pytest.mark.parametrize("how", ["the check of every step", "the next save", "the end"])
def test_failure_in_the_background_is_raised_by(tmp_path, full_disk, how):
    big = jax.tree.map(jnp.asarray, BIG)
    checkpointer = Checkpointer(tmp_path, make_config())
    with full_disk():
        checkpointer.save(2, big, {})
        checkpointer._thread.join()
    surfaces = {
        "the check of every step": checkpointer.check,
        "the next save": lambda: checkpointer.save(3, big, {}),
        "the end": checkpointer.close,
    }
    with pytest.raises(CheckpointError, match="saving checkpoint 2 failed"):
        surfaces[how]()
    assert checkpointer.all_steps() == []


def test_a_save_begins_when_the_one_before_is_complete(tmp_path, monkeypatch):
    """Each is slow in the background; a save that is asked for meanwhile waits, and is then written, too."""
    checkpointer = Checkpointer(tmp_path, make_config())
    events, save, complete = [], checkpointer._manager.save, checkpointer._complete

    def slowly(step, arrays):
        time.sleep(0.2)
        complete(step, arrays)
        events.append(("complete", step))

    def begin(step, **arguments):
        events.append(("begin", step))
        return save(step, **arguments)

    monkeypatch.setattr(checkpointer, "_complete", slowly)
    monkeypatch.setattr(checkpointer._manager, "save", begin)
    for step in (1, 2, 3):
        checkpointer.save(step, make_state(step), position_of(step))
    checkpointer.close()
    assert events == [(what, step) for step in (1, 2, 3) for what in ("begin", "complete")]
    assert list_steps(tmp_path) == [1, 2, 3]


def test_same_step_twice_is_saved_once(tmp_path):
    write_steps(tmp_path, [1])
    checkpointer = Checkpointer(tmp_path, make_config())
    with pytest.raises(CheckpointError, match="restore first"):
        checkpointer.save(1, make_state(5), position_of(5))
    checkpointer.restore(abstract(make_state(0)))
    assert not checkpointer.save(1, make_state(1), position_of(1))
    assert checkpointer.save(2, make_state(2), position_of(2))
    assert not checkpointer.save(2, make_state(2), position_of(2))
    checkpointer.close()


def test_rewinding_replaces_later_steps(copied):
    checkpointer = Checkpointer(copied, make_config())
    checkpointer.restore(abstract(make_state(0)), step=100)
    changed = make_state(200, 3)
    changed.params["encoder"]["kernel"] += 1
    checkpointer.save(200, changed, position_of(200), wait=True)
    checkpointer.close()
    assert_same(restore_newest(copied)[1], changed)


def test_config_that_does_not_fit_is_refused_with_all_differences(two_steps):
    config = make_config(**{"model.decoder.dim": 256, "optimizer.learning_rate": 0.5, "train.num_steps": 9})
    with pytest.raises(ValueError, match="another config") as caught:
        restore_newest(two_steps, config)
    text = str(caught.value)
    assert "model.decoder.dim: 128 -> 256" in text and "optimizer.learning_rate: 0.001 -> 0.5" in text
    assert "init_from" in text and "num_steps" not in text


def test_fields_that_may_change_are_announced(two_steps):
    messages = []
    config = make_config(**{
        "train.num_steps": 2000, "mesh.data": 2, "checkpoint.every_steps": 7, "data.num_threads": 1,
        "train.accumulation_steps": 2, "model.decoder.remat": "full", "eval.batch_rows": 4,
    })  # fmt: skip
    assert restore_newest(two_steps, config, messages)[0] == 200
    assert any("train.num_steps: 1000 -> 2000" in message for message in messages)


def test_a_changed_mixture_has_to_be_asked_for(two_steps):
    config = make_config(**{"data.sources.scenes.weight": 2.0})
    with pytest.raises(ValueError, match=r"data.sources.scenes.weight: 1.0 -> 2.0(.|\n)*--change-mixture"):
        restore_newest(two_steps, config)
    checkpointer = Checkpointer(two_steps, config, report=lambda _: None, change_mixture=True)
    assert checkpointer.restore(abstract(make_state(0)))[0] == 200
    assert checkpointer.mixture_changes == ["data.sources.scenes.weight: 1.0 -> 2.0"]
    checkpointer.close()
    both = make_config(**{"data.sources.scenes.weight": 2.0, "model.decoder.dim": 256})
    with pytest.raises(ValueError, match=r"model\.decoder\.dim") as caught:
        Checkpointer(two_steps, both, report=lambda _: None, change_mixture=True).restore(abstract(make_state(0)))
    assert "data.sources" not in str(caught.value)


def test_a_changed_mixture_may_have_other_sources_but_not_other_content():
    stored = {"tokenizer": "t", "sources": {"a": "1", "b": "2"}}
    check_data(stored, {"tokenizer": "t", "sources": {"b": "2", "c": "3"}}, "x", mixture_changed=True)
    for current in ({"tokenizer": "u", "sources": {"a": "1"}}, {"tokenizer": "t", "sources": {"a": "9"}}):
        with pytest.raises(ValueError, match="trained on other data"):
            check_data(stored, current, "x", mixture_changed=True)
    with pytest.raises(ValueError, match=r"sources\.c"):
        check_data(stored, {"tokenizer": "t", "sources": {"a": "1", "b": "2", "c": "3"}}, "x")


def test_free_fields_match_whole_names_only():
    old = to_dict(make_config())
    for field, free in [
        ("data.seed", False),
        ("loss.ema_decay", False),
        ("data.prefetch_batches", True),
        ("model.encoder.remat", True),
    ]:
        new = json.loads(json.dumps(old))
        section = new
        *parents, last = field.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = "changed"
        if free:
            assert len(check_config(old, new, "x")) == 1
        else:
            with pytest.raises(ValueError, match=field):
                check_config(old, new, "x")


def test_arrays_that_do_not_fit_are_listed(two_steps):
    checkpointer = Checkpointer(two_steps, make_config())
    target = abstract(make_state(0, width=4))
    target.params["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(ValueError, match="does not fit") as caught:
        checkpointer.restore(target)
    assert "params/extra: not in the checkpoint" in str(caught.value)
    assert "params/encoder/kernel: stored float32[4, 3], expected float32[4, 4]" in str(caught.value)
    checkpointer.close()


def test_subtree_of_another_run(two_steps):
    step, arrays, metadata = restore_subtree(two_steps, None, ["params/encoder"])
    assert step == 200 and list(arrays["params"]) == ["encoder"]
    np.testing.assert_array_equal(arrays["params"]["encoder"]["kernel"], make_state(200).params["encoder"]["kernel"])
    assert metadata["config"] == to_dict(make_config()) and metadata["versions"]["jax"] == jax.__version__
    target = {"params": {"encoder": {"kernel": abstract(make_state(0).params["encoder"]["kernel"])}}}
    step, arrays, _ = restore_subtree(two_steps, 100, ["params/encoder"], target)
    assert step == 100 and isinstance(arrays["params"]["encoder"]["kernel"], jax.Array)
    assert_same(arrays["params"]["encoder"], make_state(100).params["encoder"])
    with pytest.raises(ValueError, match=r"no arrays under 'params/enc'; there are .*params/encoder"):
        restore_subtree(two_steps, None, ["params/enc"])
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        restore_subtree(two_steps / "nowhere", None, ["params"])


def test_subtree_passes_over_damage_without_writing(copied):
    (copied / "checkpoints" / "200" / "state" / "_METADATA").write_bytes(b"{}")
    before = {path: path.read_bytes() for path in files_of(copied)}
    messages = []
    step, arrays, _ = restore_subtree(copied, -1, ["params"], report=messages.append)
    assert step == 100 and sorted(arrays["params"]) == ["decoder", "encoder"]
    assert "checkpoint 200 is damaged, passed over: file state/_METADATA" in messages[0]
    assert {path: path.read_bytes() for path in files_of(copied)} == before


PROCESSES = """
    # Imports once, then forks: each child starts its own jax backend, and a child may be killed.
    import os, sys
    import numpy as np
    import jax
    from tests import test_checkpoint as t
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    root = sys.argv[1]

    def run(function, *args):
        pid = os.fork()
        if pid == 0:
            try:
                function(*args)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(function.__name__, *args, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

    def killed(point):
        os.environ["UNIHETERO_KILL_AT"] = point + ":3"
        checkpointer = t.Checkpointer(f"{root}/{point}", t.make_config(**{"checkpoint.keep_last": 2}))
        for step in range(1, 6):
            checkpointer.save(step, t.make_state(step), t.position_of(step))
        checkpointer.close()

    def meshes(count):
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=%s" % count
        devices = np.array(jax.devices())
        assert len(devices) == int(count)
        workdir, value = f"{root}/mesh", np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
        grid = devices.reshape(-1, 2) if len(devices) > 1 else devices[:, None]
        rows = NamedSharding(Mesh(grid, ("data", "tensor")), P("data", "tensor"))
        scalar = NamedSharding(rows.mesh, P())
        checkpointer = t.Checkpointer(workdir, t.make_config())
        if count == "8":
            state = {"params": {"w": jax.device_put(value, rows)}, "step": jax.device_put(np.int32(5), scalar)}
            checkpointer.save(5, state, {}, wait=True)
        target = {
            "params": {"w": jax.ShapeDtypeStruct((64, 16), np.float32, sharding=rows)},
            "step": jax.ShapeDtypeStruct((), np.int32, sharding=scalar),
        }
        step, state, _ = checkpointer.restore(target)
        assert step == 5 and int(state["step"]) == 5
        assert state["params"]["w"].sharding == rows and len(state["params"]["w"].addressable_shards) == int(count)
        np.testing.assert_array_equal(state["params"]["w"], value)
        part = t.restore_subtree(workdir, None, ["params"], {"params": target["params"]})[1]
        assert part["params"]["w"].sharding == rows
        checkpointer.close()

    for point in ("before_save", "during_save", "after_orbax_commit", "before_manifest", "during_retention"):
        run(killed, point)
    for count in ("8", "1", "2"):
        run(meshes, count)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    repository = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": repository}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESSES), str(root)], capture_output=True, text=True, env=environment,
        cwd=repository, timeout=300, check=False,
    )  # fmt: skip
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith(("killed ", "meshes "))]
    return root, {name: int(code) for name, code in lines}, done.stderr


@pytest.mark.parametrize(("point", "survivor"), [
    ("before_save", 2), ("during_save", 2), ("after_orbax_commit", 2), ("before_manifest", 2), ("during_retention", 3),
])  # fmt: skip
def test_killed_at_every_point(processes, point, survivor):
    root, codes, errors = processes
    assert codes[f"killed {point}"] == -9, errors
    workdir = root / point
    messages = []
    checkpointer = Checkpointer(workdir, make_config(**{"checkpoint.keep_last": 2}), report=messages.append)
    step, state, position = checkpointer.restore(abstract(make_state(0)))
    assert step == survivor
    assert_same(state, make_state(survivor))
    np.testing.assert_array_equal(position["position"], position_of(survivor)["position"])
    if point not in ("before_save", "during_save"):  # there Orbax may not have made its folder yet
        assert any("leftover" in message for message in messages)
    for following in range(survivor + 1, 6):
        checkpointer.save(following, make_state(following), position_of(following))
    checkpointer.close()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "5", "completed.json"]
    assert_same(restore_newest(workdir)[1], make_state(5))


@pytest.mark.parametrize("count", [8, 1, 2])
def test_restore_onto_another_mesh(processes, count):
    _, codes, errors = processes
    assert codes[f"meshes {count}"] == 0, errors


def test_killed_in_the_first_save_starts_fresh(tmp_path):
    """No checkpoint was ever complete, so starting at step 0 loses nothing."""
    write_steps(tmp_path, [10])
    (tmp_path / "checkpoints" / "10" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "completed.json").unlink()
    assert restore_newest(tmp_path) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []
