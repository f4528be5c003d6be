"""Prepared folders and workdirs in a bucket, of an emulated store that fails and is slow (`tests/bucket_server.py`)."""

import collections
import json
import signal
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from data_pipelines import convert, index
from data_pipelines.writer import check_prepared, read_records
from experiments import base
from tests.bucket_server import DAMAGED, FORBIDDEN, UNAVAILABLE, running_bucket
from tests.fork_server import ForkServer
from tests.test_mixture import WORDS, make_records, write_source
from unihetero_jax import storage
from unihetero_jax.checkpoint import Checkpointer, list_steps
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data import shards
from unihetero_jax.data.mixture import make_train_iterator
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer
from unihetero_jax.metrics import METRICS_NAME, REPLACED_NAME, read_metrics
from unihetero_jax.profiling import Profile
from unihetero_jax.workdir import GrowingFiles

ROOT = Path(__file__).resolve().parent.parent
NUM_FILES, NUM_BATCHES = 6, 30


@pytest.fixture(scope="module")
def started():
    with running_bucket() as bucket:
        yield bucket


@pytest.fixture
def bucket(started, monkeypatch):
    """The store, in order again; and no long waits between attempts."""
    started.faults.__init__()
    monkeypatch.setattr(storage, "_wait", storage.tenacity.wait_none())
    yield started
    started.faults.__init__()


@pytest.fixture(scope="module")
def local_sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    tokenizer = train_tokenizer((" ".join(WORDS) + f" {i}" for i in range(50)), 320, root / "tokenizer")
    for name, count in (("a", 300), ("b", 70)):
        splits = {"train": make_records(name, count), "val": []}
        write_source(root / name, name, tokenizer, splits, num_files=NUM_FILES)
    return root


def make_config(root, **data):
    values = base.get_config()
    values.data.sources = {
        name: {"path": f"{root}/{name}", "weight": weight, "augment": "mirror_shift"}
        for name, weight in (("a", 3.0), ("b", 1.0))
    }
    values.data.update(
        {"tokenizer": f"{root}/tokenizer", "row_tokens": 160, "row_patches": 144, "image_min_patches": 4,
         "window_size": 40, "num_data_shards": 4, "num_threads": 4, **data}
    )  # fmt: skip
    values.train.global_batch_rows = 4
    return from_config_dict(values)


def stream_of(config, count=NUM_BATCHES, state=None):
    """The row hashes of so many batches, the counters of all of them, and the state after the first ten."""
    shards.shared_readers.cache_clear()
    stream = make_train_iterator(config, load_tokenizer(config.data.tokenizer))
    try:
        if state:
            stream.set_state(state)
        hashes, counters, after_ten = [], collections.Counter(), None
        for number in range(count):
            batch = next(stream)
            hashes.append(batch.arrays["row_hash"].tolist())
            counters.update(batch.counters)
            after_ten = stream.get_state() if number == 9 else after_ten
        return hashes, counters, after_ten
    finally:
        stream.close()
        for name, source in stream._sources.items():
            source.readers._staging.shutdown()
            counters[f"storage_retries/{name}"] += source.take_retries()  # of files copied ahead and not read any more


@pytest.fixture(scope="module")
def local_stream(local_sources):
    return stream_of(make_config(local_sources))


@pytest.mark.slow
def test_a_failing_store_gives_the_local_stream(bucket, local_sources, local_stream):
    """Five times the failures that are asked for; those that gcsfs cannot repeat by itself are counted."""
    root = bucket.copy_folder(local_sources, "failing")
    bucket.faults.every = 20
    bucket.faults.kinds = (FORBIDDEN, DAMAGED)
    bucket.faults.matching = "array_record"
    hashes, counters, state = stream_of(make_config(root, cache_gib=3 * 2**18 / 2**30))
    assert hashes == local_stream[0] and counters["failed/a"] == counters["failed/b"] == 0
    assert min(bucket.faults.failed[kind] for kind in (FORBIDDEN, DAMAGED)) >= 1
    assert counters["storage_retries/a"] + counters["storage_retries/b"] == sum(bucket.faults.failed.values())
    resumed, _, _ = stream_of(make_config(root), NUM_BATCHES - 10, state)
    assert resumed == local_stream[0][10:]


def test_what_the_client_repeats_is_not_ours_to_count(bucket, local_sources, local_stream):
    root = bucket.copy_folder(local_sources, "unavailable")
    bucket.faults.every, bucket.faults.kinds = 10, (UNAVAILABLE,)
    hashes, counters, _ = stream_of(make_config(root))
    assert hashes == local_stream[0] and bucket.faults.failed[UNAVAILABLE] >= 1
    assert counters["storage_retries/a"] == counters["storage_retries/b"] == 0


def test_a_slow_store_delays_and_changes_nothing(bucket, local_sources, local_stream):
    root = bucket.copy_folder(local_sources, "slow")
    bucket.faults.delay_s = 0.2
    start = time.monotonic()
    assert stream_of(make_config(root))[0] == local_stream[0]
    assert time.monotonic() - start > 2 * NUM_FILES * 0.2, "every file was waited for"


@pytest.mark.slow
def test_copies_are_bounded_and_go_with_the_process(bucket, local_sources, local_stream, tmp_path, monkeypatch):
    root = bucket.copy_folder(local_sources, "bounded")
    sizes = [path.stat().st_size for path in local_sources.rglob("train-*.array_record")]
    limit = 2 * max(sizes) + 1
    assert sum(sizes) > 2 * limit
    make_room, taken, others = shards.ShardReaders._make_room, [], set()

    def watch(readers, shard):
        make_room(readers, shard)
        taken.append(sum(readers._staged.values()))
        there = {path.name for path in tmp_path.glob("unihetero-shards-*/*") if path.suffix != ".tmp"}
        others.update(there - {readers._copy_of(path).name for path in readers._staged})

    monkeypatch.setattr(shards.ShardReaders, "_make_room", watch)
    config = make_config(root, cache_dir=str(tmp_path), cache_gib=limit / 2**30)
    assert stream_of(config)[0] == local_stream[0]
    assert limit / 2 < max(taken) <= limit
    assert len(others) == 3, "the lock and two indices; a file that had to make room is gone"
    reads = sum(count for name, count in bucket.faults.reads.items() if "bounded" in name and "array_record" in name)
    assert reads > 2 * NUM_FILES, "a file that had to go was read again"
    (folder,) = tmp_path.glob("unihetero-shards-*")
    (tmp_path / "unihetero-shards-dead").mkdir()
    (tmp_path / "unihetero-shards-dead" / "lock").touch()
    shards._make_folder(tmp_path)
    assert folder.exists() and not (tmp_path / "unihetero-shards-dead").exists()


def test_a_file_larger_than_the_copies_may_be_is_refused(bucket, local_sources):
    root = bucket.copy_folder(local_sources, "large")
    with pytest.raises(ValueError, match=r"data.sources\S+ \S+ has \d+ bytes, more than the 100 of data.cache_gib"):
        stream_of(make_config(root, cache_gib=100 / 2**30))


def test_a_store_that_stays_down_is_asked_five_times(bucket, local_sources):
    root = bucket.copy_folder(local_sources, "down")
    bucket.faults.every, bucket.faults.kinds, bucket.faults.matching = 1, (FORBIDDEN,), "down/a/train-00002"
    with pytest.raises(shards.ShardError, match=r"(?s)data.sources.a.path: reading \S+ failed 5 times.*same command"):
        stream_of(make_config(root))
    reads = [count for name, count in bucket.faults.reads.items() if "down/a/train-00002" in name]
    assert reads and reads[0] % storage.ATTEMPTS == 0  # each of those that wanted it, ahead or now


def test_requests_of_every_kind_are_repeated(bucket):
    """One of nine fails, whatever it asks for; a removal, which is repeated whole, makes fewer requests than that."""
    bucket.faults.every, bucket.faults.kinds, bucket.faults.everything = 9, (FORBIDDEN,), True
    folder = bucket.root / "repeated"
    for number in range(6):
        storage.write_bytes(folder / "in" / f"{number}", bytes([number]))
    assert [storage.read_bytes(path) for path in storage.list_folder(folder / "in")] == [bytes([n]) for n in range(6)]
    assert storage.is_folder(folder / "in") and not storage.is_folder(folder / "in" / "1")
    assert storage.size_of(folder / "in" / "1") == 1 and not storage.file_exists(folder / "in" / "7")
    storage.remove(folder / "in" / "1")
    storage.remove(folder / "in" / "1")
    assert [path.name for path in storage.list_folder(folder / "in")] == ["0", "2", "3", "4", "5"]
    storage.remove_tree(folder)
    assert storage.list_folder(folder) == [] and bucket.faults.failed[FORBIDDEN] > 3


def test_an_interrupt_is_not_repeated(bucket):
    calls = []

    def interrupted():
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.attempt("reading x", interrupted)
    assert len(calls) == 1


def test_a_store_that_does_not_answer_makes_no_checkpoint_a_damaged_one(bucket, tiny_experiment):
    workdir, config = "gs://bucket/unanswered", tiny_experiment()
    state = {"params": {"a": np.arange(10.0)}}
    checkpointer = Checkpointer(workdir, config)
    for step in (1, 2):
        checkpointer.save(step, state, {"position": np.zeros((4, 2), np.int64)}, wait=True)
    bucket.faults.every, bucket.faults.kinds, bucket.faults.matching = 1, (FORBIDDEN,), "checkpoints/2/state/d/"
    with pytest.raises(storage.StorageError, match=r"checkpoints/2/state/d/\S+ failed 5 times"):
        checkpointer.restore(state)
    bucket.faults.every = 0
    assert list_steps(workdir) == [1, 2] and checkpointer.restore(state)[0] == 2
    checkpointer.close()


def test_metric_lines_of_a_run_that_ends_without_its_store_are_kept(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told = []
    files = GrowingFiles("gs://bucket/gone", ["metrics.jsonl"], told.append)
    (files.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    bucket.faults.every, bucket.faults.kinds, bucket.faults.everything = 1, (FORBIDDEN,), True
    files.close()
    assert str(files.folder) in told[0] and (files.folder / "metrics.jsonl").exists()


def test_faulty_files_are_named(bucket, local_sources):
    root = bucket.copy_folder(local_sources, "faulty")
    shard = epath.Path(root) / "b" / f"train-00001-of-{NUM_FILES:05d}.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"data.sources.b.path: reading gs://\S+b/train-00001\S+ failed .* its digest"):
        stream_of(make_config(root))
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"b/train-00001\S+ has {len(content) - 1} bytes, manifest.json says"):
        stream_of(make_config(root))
    shard.unlink()
    with pytest.raises(ValueError, match=r"b/train-00001\S+ is missing, though manifest.json lists it"):
        stream_of(make_config(root))
    with pytest.raises(ValueError, match=r"nowhere/a/manifest.json does not exist"):
        stream_of(make_config("gs://bucket/nowhere", tokenizer=f"{root}/tokenizer"))


def test_unknown_stores_are_refused():
    with pytest.raises(storage.StorageError, match=r"ftp://x/y: ftp:// is no store that can be used"):
        storage.to_path("ftp://x/y")
    with pytest.raises(storage.StorageError, match=r"s3://x/y: .*pip install s3fs"):
        storage.to_path("s3://x/y")


def prepare(tmp_path, output, local_sources):
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps({"text": f"note {i} of many"}) + "\n" for i in range(60)))
    return convert.main(
        ["jsonl", "--input", str(notes), f"--output={output}", f"--tokenizer={local_sources}/tokenizer",
         "--source=notes", "--num-shards=3"]
    )  # fmt: skip


def test_a_preparation_into_a_bucket(bucket, local_sources, tmp_path, capsys, monkeypatch):
    """The same files as locally; a crash leaves nothing that looks finished; another index is added in place."""
    assert prepare(tmp_path, tmp_path / "notes", local_sources) == 0
    remote = bucket.root / "notes"
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.writer.write_bytes", lambda *_: (_ for _ in ()).throw(RuntimeError("crash")))
        with pytest.raises(RuntimeError, match="crash"):
            prepare(tmp_path, remote, local_sources)
    assert "no readable manifest.json" in check_prepared(remote) and list(remote.iterdir())
    assert prepare(tmp_path, remote, local_sources) == 0
    for path in (path for path in (tmp_path / "notes").rglob("*") if path.is_file()):
        assert (remote / path.relative_to(tmp_path / "notes").as_posix()).read_bytes() == path.read_bytes(), path
    assert check_prepared(remote) == "" and read_records(remote, "train") == read_records(tmp_path / "notes", "train")
    capsys.readouterr()
    assert prepare(tmp_path, remote, local_sources) == 2
    assert "gs://bucket/notes exists; remove it" in capsys.readouterr().err
    (bucket.root / "sets" / "thesis.txt").write_text("years of work")
    assert prepare(tmp_path, bucket.root / "sets", local_sources) == 2
    assert "gs://bucket/sets holds thesis.txt, which no preparation wrote" in capsys.readouterr().err
    assert (bucket.root / "sets" / "thesis.txt").exists()
    assert index.main([str(remote), f"--tokenizer={local_sources}/tokenizer", "--patch-size=4"]) == 0
    assert len([path for path in (remote / "index").iterdir() if path.name.endswith(".train.npy")]) == 2


def trace_of(lines):
    kept = ("step", "loss", "batch_hash", "terms", "gradient_norm", "learning_rate")
    return [{name: line[name] for name in kept} for line in lines]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, tiny_world, tiny_flags, tmp_path):
    """Data, tokenizer and workdir in the bucket, one read in 50 failing: the local run, to the bit."""
    for name in ("qa", "generation", "tokenizer"):
        bucket.copy_folder(tiny_world / name, f"world/{name}")
    remote = {"data.sources.qa.path": "gs://bucket/world/qa", "data.tokenizer": "gs://bucket/world/tokenizer",
              "data.sources.generation.path": "gs://bucket/world/generation", "scene_world.level": "none"}  # fmt: skip
    in_bucket = [*tiny_flags(), *(f"--config.{name}={value}" for name, value in remote.items())]
    start = ["train", "--config=experiments/quickstart.py"]
    with ForkServer(ROOT) as program:
        assert program.run([*start, f"--workdir={tmp_path / 'run'}", *tiny_flags()]).code == 0
        unbroken = trace_of(read_metrics(tmp_path / "run"))
        assert [line["step"] for line in unbroken] == list(range(1, 9))

        workdir = "gs://bucket/run"
        bucket.faults.every, bucket.faults.kinds = 50, (UNAVAILABLE,)
        for kill_at in ("during_save:2", "before_manifest:4"):
            killed = program.run([*start, f"--workdir={workdir}", *in_bucket], kill_at=kill_at)
            assert killed.code == -signal.SIGKILL, killed.output
        assert list_steps(workdir) == [2]
        finished = program.run([*start, f"--workdir={workdir}", *in_bucket])
        assert finished.code == 0, finished.output
        assert "going on from the checkpoint of step 2" in finished.output
        assert trace_of(read_metrics(workdir)) == unbroken
        assert list_steps(workdir) == [6, 8] and not storage.file_exists(epath.Path(workdir) / "lock.json")
        assert bucket.faults.failed.total() > 0
        assert {path.name for path in storage.list_folder(epath.Path(workdir))} >= {
            METRICS_NAME, REPLACED_NAME, "config.json", "checkpoints", "tensorboard", "gradient_table.json"
        }  # fmt: skip

        told = program.run(["generate", f"--workdir={workdir}", "--prompt=a red", "--max-new-tokens=4"])
        assert told.code == 0, told.output
        counted = program.run(["data-stats", f"--workdir={workdir}"])
        assert counted.code == 0 and "drawn up to step 8" in counted.output, counted.output


def test_a_trace_is_copied_to_the_bucket_whole(bucket):
    """The profiler writes to file systems alone; a copy that fails is tried again."""
    told, step = [], jax.jit(lambda x: x + 1)
    bucket.faults.every, bucket.faults.kinds, bucket.faults.matching = 2, (UNAVAILABLE,), "xplane"
    profile = Profile((1, 2), bucket.root / "traced", 0, told.append)
    for number in (1, 2, 3):
        profile.run(number, step, 0.0)
    (folder,) = storage.list_folder(bucket.root / "traced" / "profile" / "plugins" / "profile")
    (trace,) = (path for path in storage.list_folder(folder) if path.name.endswith(".xplane.pb"))
    planes = jax.profiler.ProfileData.from_serialized_xspace(storage.read_bytes(trace)).planes
    steps = [dict(e.stats)["step_num"] for p in planes for line in p.lines for e in line.events if e.name == "train"]
    assert [int(number) for number in steps] == [1, 2]
    assert "gs://bucket/traced/profile" in told[0]
