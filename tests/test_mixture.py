"""The stream: a function of the configuration alone, exact after any restart, the same on any number of processes."""

import dataclasses
import hashlib
import io
import itertools
import json
import shlex
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipelines import index as index_command
from data_pipelines.writer import build_index
from experiments import base
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data import mixture, records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.schedule import Member, MixtureSchedule, epoch_records
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

SPEC = ImageSpec(8, 4, 36)
WORDS = "red blue green square circle triangle left right above below small large a is the".split()


def png(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_records(name, count):
    """Text, read images and generated images of many aspect ratios; the id in the text tells them apart."""
    made = []
    for i in range(count):
        rng = np.random.default_rng([count, i])
        text = f"{name} {i} " + " ".join(rng.choice(WORDS, rng.integers(1, 30)))
        height, width = (int(side) for side in rng.integers(16, 60, 2))
        image = ImageSegment(png(height, width, i), height, width)
        segments = [
            (TextSegment(text, True),),
            (image, TextSegment(text), TextSegment(" red", True)),
            (TextSegment(text, True), image),
        ][i % 3]
        made.append(Record(name, "caption", segments, {"id": i}))
    return made


def write_source(folder, name, tokenizer, splits, spec=SPEC, num_files=2):
    """A prepared folder as the preparation writes it."""
    folder.mkdir(parents=True)
    (folder / "index").mkdir()
    files = {}
    for split, items in splits.items():
        costs = [records.record_cost(record, tokenizer.encode, spec) for record in items]
        index = np.zeros(len(items), records.INDEX_DTYPE)
        for i, (record, (tokens, patches)) in enumerate(zip(items, costs, strict=True)):
            index[i] = (tokens, patches, sum(isinstance(s, ImageSegment) for s in record.segments), 0)
        np.save(folder / "index" / f"{records.index_key(tokenizer.hash, spec)}.{split}.npy", index)
        for number, part in enumerate(np.array_split(np.arange(len(items)), num_files)):
            path = folder / f"{split}-{number:05d}-of-{num_files:05d}.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for i in part:
                writer.write(records.serialize(items[i]))
            writer.close()
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
            files[path.name] = {"bytes": path.stat().st_size, "digest": digest, "records": len(part)}
    manifest = {
        "record_version": records.RECORD_VERSION,
        "source": name,
        "files": files,
        "dropped": {},
        "dropped_examples": {},
        "licence": "",
        "num_records": {split: len(items) for split, items in splits.items()},
        "settings": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((" ".join(WORDS) + f" {i}" for i in range(50)), 320, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("prepared")
    write_source(root / "a", "a", tokenizer, {"train": make_records("a", 70), "val": make_records("v", 23)})
    write_source(root / "b", "b", tokenizer, {"train": make_records("b", 31), "val": []})
    return root


def make_config(folders, tokenizer_folder, **overrides):
    config = base.get_config()
    config.data.sources = {
        "a": {"path": str(folders / "a"), "weight": 3.0, "augment": "mirror_shift"},
        "b": {"path": str(folders / "b"), "weight": 1.0, "augment": "none"},
    }
    config.data.tokenizer = str(tokenizer_folder)
    config.data.update(
        row_tokens=160,
        row_patches=144,
        image_min_patches=SPEC.min_patches,
        window_size=40,
        image_max_patches=SPEC.max_patches,
        num_data_shards=4,
        max_failed_share=0.5,
    )
    config.train.global_batch_rows = 8
    config.eval.batch_rows = 4
    for path, value in overrides.items():
        section, field = path.split("__")
        config[section][field] = value
    return from_config_dict(config)


def take(iterator, count):
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_same(left, right):
    assert [b.sample_ids for b in left] == [b.sample_ids for b in right]
    for a, b in zip(left, right, strict=True):
        assert a.counters == b.counters
        for name, value in a.arrays.items():
            np.testing.assert_array_equal(value, b.arrays[name], err_msg=name)


@pytest.fixture(scope="module")
def reference(folders, tokenizer, tokenizer_folder):
    """24 batches, more than two windows of every shard, and the state after each."""
    iterator = mixture.make_train_iterator(make_config(folders, tokenizer_folder), tokenizer)
    states, batches = [iterator.get_state()], []
    for _ in range(24):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    iterator.close()
    assert (states[-1]["position"][:, 0] >= 2).all()
    return batches, states


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (1, 4), (2, 4)])
def test_stream_does_not_depend_on_threads_or_prefetch(
    folders, tokenizer, tokenizer_folder, reference, threads, prefetch
):
    config = make_config(folders, tokenizer_folder, data__num_threads=threads, data__prefetch_batches=prefetch)
    iterator = mixture.make_train_iterator(config, tokenizer)
    batches = [next(iterator) for _ in range(24)]
    np.testing.assert_array_equal(iterator.get_state()["position"], reference[1][24]["position"])
    iterator.close()
    assert_same(batches, reference[0])


def test_restores_after_every_batch(folders, tokenizer, tokenizer_folder, reference):
    batches, states = reference
    iterator = mixture.make_train_iterator(make_config(folders, tokenizer_folder), tokenizer)
    for after in (23, 0, 11, 5, 6, 7, 8, 9, 1, 17):
        iterator.set_state(states[after])
        np.testing.assert_array_equal(iterator.get_state()["position"], states[after]["position"])
        following = [next(iterator) for _ in range(min(2, 24 - after))]
        assert_same(following, batches[after : after + 2])
    iterator.close()
    for after in range(0, 24, 6):
        fresh = mixture.make_train_iterator(make_config(folders, tokenizer_folder), tokenizer)
        fresh.set_state(states[after])
        assert_same(take(fresh, 1), batches[after : after + 1])


@pytest.mark.parametrize(
    ("shards", "batch_rows", "parts"),
    [
        (4, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 8, [[7, 0], [1, 2, 3], [4, 5, 6]]),
        (2, 8, [[0], [1, 2, 3, 4, 5], [6, 7]]),
        (8, 4, [[0, 1], [2, 3]]),
        (6, 3, [[0], [1], [2]]),
    ],
)
def test_processes_together_make_the_whole(folders, tokenizer, tokenizer_folder, shards, batch_rows, parts):
    config = make_config(folders, tokenizer_folder, data__num_data_shards=shards, train__global_batch_rows=batch_rows)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_rows=4))
    whole = mixture.make_train_iterator(config, tokenizer)
    split = [mixture.make_train_iterator(config, tokenizer, rows=rows) for rows in parts]
    for step in range(14):
        expected, found = next(whole), [next(iterator) for iterator in split]
        for rows, batch in zip(parts, found, strict=True):
            for name, value in batch.arrays.items():
                np.testing.assert_array_equal(value, expected.arrays[name][rows], err_msg=f"{step} {name}")
        for key in ("samples/a", "tokens/b", "pad_tokens", "dropped/a"):
            assert sum(batch.counters[key] for batch in found) == expected.counters[key]
    merged = mixture.merge_positions([iterator.get_state()["position"] for iterator in split])
    np.testing.assert_array_equal(merged, whole.get_state()["position"])
    state = {"position": merged, "batch": split[0].get_state()["batch"]}
    expected = next(whole)
    split[0].set_state(state)
    found = next(split[0])
    np.testing.assert_array_equal(found.arrays["row_hash"], expected.arrays["row_hash"][parts[0]])
    for iterator in (whole, *split):
        iterator.close()


def test_shards_of_a_batch():
    assert mixture.batch_shards(5, 8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert mixture.batch_shards(0, 2, 6).tolist() == [0, 1]
    assert mixture.batch_shards(4, 2, 6).tolist() == [2, 3]
    assert mixture.batch_shards(3, 4, 4).tolist() == [0, 1, 2, 3]


def lengths(count, tokens=10):
    index = np.zeros(count, records.INDEX_DTYPE)
    index["num_tokens"] = tokens
    return index


def make_planner(sizes, window=64, shards=2, seed=0):
    schedule = MixtureSchedule({name: Member(size, 1.0) for name, size in sizes.items()}, seed, window)
    return mixture.WindowPlanner({name: lengths(size) for name, size in sizes.items()}, schedule, seed, 128, 8, shards)


def test_windows_cover_the_draws_once():
    planner = make_planner({"a": 3000}, window=100, shards=3)
    seen = []
    for window in range(5):
        for shard in range(3):
            plan = planner.plan(shard, window)
            assert sorted(itertools.chain(*plan.rows)) == list(range(100))
            seen += plan.records.tolist()
    assert seen == epoch_records(0, "a", 3000, 0, 0, 1500).tolist()


def test_too_long_records_are_dropped_and_counted(tmp_path, tokenizer, tokenizer_folder):
    items = make_records("a", 20)
    items[3] = Record("a", "text", (TextSegment("red " * 400, True),))
    items[8] = Record("a", "text", (TextSegment("blue " * 500, True),))
    write_source(tmp_path / "a", "a", tokenizer, {"train": items})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 10)})
    config = make_config(
        tmp_path, tokenizer_folder, data__num_data_shards=1, data__window_size=80, train__global_batch_rows=1
    )
    iterator = mixture.make_train_iterator(config, tokenizer)
    first_rows = []
    while iterator.get_state()["position"][0, 0] == 0:
        first_rows.append(next(iterator))
    iterator.close()
    assert first_rows[0].counters["dropped/a"] == 6  # 60 draws of a are three epochs of 20
    assert sum(batch.counters["dropped/a"] for batch in first_rows) == 6
    ids = list(itertools.chain(*(batch.sample_ids for batch in first_rows)))
    assert not {"a/3", "a/8"} & set(ids)
    assert sorted(ids) == sorted(
        [f"a/{i}" for i in range(20) if i not in (3, 8)] * 3 + [f"b/{i}" for i in range(10)] * 2
    )


def test_a_coin_orders_pairs_anew_in_every_epoch(tmp_path, tokenizer, tokenizer_folder):
    pair = [record for record in make_records("a", 180) if isinstance(record.segments[-1], ImageSegment)]
    write_source(tmp_path / "a", "a", tokenizer, {"train": pair, "val": pair})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 31)})

    def text_first(share, objective="semantic_input", **fields):
        """Epoch by epoch, whether each record of `a` was drawn text first: then its image carries the loss."""
        source = {"path": str(tmp_path / "a"), "weight": 30.0, "augment": "none"}
        source |= {"order": "coin", "text_first_share": share, **fields}
        config = base.get_config()
        with config.ignore_type():
            config.data.sources = {"a": source}
        config.data.update(
            tokenizer=str(tokenizer_folder), row_tokens=100, row_patches=36, image_min_patches=4, num_data_shards=1
        )
        config.train.global_batch_rows = 1
        config.objective = objective
        iterator = mixture.make_train_iterator(from_config_dict(config), tokenizer)
        seen = {}
        while len(seen) < 120:
            batch = next(iterator)
            segments, drawn = batch.arrays["segment_ids"][0], batch.arrays["visual_loss_mask"][0]
            for number, name in enumerate(batch.sample_ids, start=1):
                first = seen.setdefault((name, 0), []) if (name, 0) not in seen else seen.setdefault((name, 1), [])
                first.append(bool(drawn[segments == number].any()))
        iterator.close()
        return {key: values[0] for key, values in seen.items()}

    assert not any(text_first(1.0, objective="understanding_i2t").values()), "the fair baseline reads every image first"
    half = text_first(0.5)
    assert 40 < sum(half.values()) < 80
    both = [name for name, epoch in half if epoch == 1]
    assert len(both) == 60 and 10 < sum(half[name, 0] != half[name, 1] for name in both) < 50
    assert all(text_first(1.0).values()) and not any(text_first(0.0).values())
    assert not any(text_first(1.0, visual_loss="none").values())


def test_targets_are_counted_by_source(reference):
    for batch in reference[0]:
        for kind in ("text", "visual"):
            mask, sources = batch.arrays[f"{kind}_loss_mask"], batch.arrays["source_ids"]
            counted = {name: batch.counters[f"{kind}_targets/{name}"] for name in "ab"}
            assert counted == {"a": (mask & (sources == 0)).sum(), "b": (mask & (sources == 1)).sum()}
            assert sum(counted.values()) == mask.sum() > 0


def test_a_mixture_ends_where_what_is_left_fits_no_row(tmp_path, tokenizer, tokenizer_folder):
    long = [Record("a", "text", (TextSegment(" ".join(WORDS * 60), True),), {"id": i}) for i in range(5)]
    write_source(tmp_path / "a", "a", tokenizer, {"train": long})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 20)})
    config = make_config(tmp_path, tokenizer_folder, train__global_batch_rows=1, data__num_data_shards=1)
    sources = config.data.sources | {"b": dataclasses.replace(config.data.sources["b"], max_epochs=2.0)}
    iterator = mixture.make_train_iterator(
        dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources)), tokenizer
    )
    seen = []
    with pytest.raises(ValueError, match=r"no record of a fits a row .* and no other source is drawn any more"):
        while True:
            seen += next(iterator).sample_ids
    iterator.close()
    assert sorted(seen) == sorted(2 * [f"b/{i}" for i in range(20)])


def test_a_source_may_be_limited_to_its_first_records(tmp_path, tokenizer, tokenizer_folder):
    """The records are repeated like those of a folder that has no others; validation keeps all of its own."""
    for name, count in (("a", 50), ("b", 20)):
        write_source(
            tmp_path / name, name, tokenizer, {"train": make_records(name, count), "val": make_records(name, 9)}
        )
    config = make_config(tmp_path, tokenizer_folder, train__global_batch_rows=1, data__num_data_shards=1)
    limits = {"a": 7, "b": 0}

    def limited(**changes):
        sources = {
            name: dataclasses.replace(s, max_epochs=2.0, max_records=limits[name], **changes)
            for name, s in config.data.sources.items()
        }
        return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))

    iterator = mixture.make_train_iterator(limited(), tokenizer)
    seen = []
    with pytest.raises(ValueError, match="have reached their max_epochs"):
        while True:
            seen += next(iterator).sample_ids
    iterator.close()
    assert sorted(seen) == sorted(2 * [f"a/{i}" for i in range(7)] + 2 * [f"b/{i}" for i in range(20)])
    assert len(mixture.open_split(limited(), tokenizer, "a", "val")) == 9
    limits["a"] = 51
    with pytest.raises(ValueError, match=r"data.sources.a.max_records 51: there are 50 training records; lower it"):
        mixture.make_train_iterator(limited(), tokenizer)


def test_a_mixture_ends_where_every_source_reached_its_epochs(tmp_path, tokenizer, tokenizer_folder):
    for name, count in (("a", 50), ("b", 20)):
        write_source(tmp_path / name, name, tokenizer, {"train": make_records(name, count)})
    config = make_config(tmp_path, tokenizer_folder, train__global_batch_rows=1, data__num_data_shards=1)
    sources = {name: dataclasses.replace(s, max_epochs=2.0) for name, s in config.data.sources.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    iterator = mixture.make_train_iterator(config, tokenizer)
    seen = []
    with pytest.raises(ValueError, match=r"a, b have reached their max_epochs; raise one, or train fewer steps"):
        while True:
            seen += next(iterator).sample_ids
    iterator.close()
    assert sorted(seen) == sorted(2 * [f"a/{i}" for i in range(50)] + 2 * [f"b/{i}" for i in range(20)])


def test_a_changed_mixture_goes_on_where_each_source_was(tmp_path, tokenizer, tokenizer_folder):
    for name, count in (("a", 400), ("b", 150), ("new", 200)):
        write_source(tmp_path / name, name, tokenizer, {"train": make_records(name, count)})
    config = make_config(tmp_path, tokenizer_folder, data__num_data_shards=2)
    iterator = mixture.make_train_iterator(config, tokenizer)
    before = [sample for _ in range(4) for sample in next(iterator).sample_ids]
    state = iterator.get_state()
    iterator.close()
    assert state["drawn:a"] % 30 in (0, 1, 29) and state["drawn:a"] >= sum(name[0] == "a" for name in before)

    sources = {"a": dataclasses.replace(config.data.sources["a"], weight=1.0)}
    sources["new"] = dataclasses.replace(sources["a"], path=str(tmp_path / "new"))
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    iterator = mixture.make_train_iterator(changed, tokenizer)
    assert iterator.start_after(state) == {"a": state["drawn:a"], "new": 0}
    after, states = [], []
    for _ in range(4):
        after.append(next(iterator).sample_ids)
        states.append(iterator.get_state())
    drawn = [sample for samples in after for sample in samples]
    assert len(set(before) & set(drawn)) == 0 and len(set(drawn)) == len(drawn)
    assert {sample.partition("/")[0] for sample in drawn} == {"a", "new"}

    iterator.set_state(states[2])  # a restart goes on within the changed mixture
    assert [next(iterator).sample_ids] == after[3:]
    iterator.close()


def test_nothing_fits_is_an_error(tmp_path, tokenizer, tokenizer_folder):
    for name in "ab":
        write_source(tmp_path / name, name, tokenizer, {"train": [Record(name, "text", (TextSegment("red " * 400),))]})
    iterator = mixture.make_train_iterator(make_config(tmp_path, tokenizer_folder), tokenizer)
    with pytest.raises(ValueError, match=r"no record of a, b fits a row of data\.row_tokens 160"):
        next(iterator)
    iterator.close()


def damage(folder, bad):
    """Rewrites the records of a source, some as they should not be; the index stays."""
    items = make_records("a", 70)
    wrong = {i: records.serialize(items[i]) for i in bad}
    keys = list(bad)
    truncated = next(s for s in items[keys[0]].segments if isinstance(s, ImageSegment))
    cut = dataclasses.replace(truncated, data=truncated.data[: -len(truncated.data) // 2])
    wrong[keys[0]] = records.serialize(
        dataclasses.replace(
            items[keys[0]], segments=tuple(cut if isinstance(s, ImageSegment) else s for s in items[keys[0]].segments)
        )
    )
    wrong[keys[1]] = b"\x00 no record"
    wrong[keys[2]] = records.serialize(Record("a", "text", (TextSegment("longer than the index says " * 3, True),)))
    for number, part in enumerate(np.array_split(np.arange(70), 2)):
        writer = ArrayRecordWriter(str(folder / f"train-{number:05d}-of-00002.array_record"), "group_size:1")
        for i in part:
            writer.write(wrong.get(int(i), records.serialize(items[i])))
        writer.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    for file, entry in manifest["files"].items():
        content = (folder / file).read_bytes()
        entry |= {"bytes": len(content), "digest": hashlib.blake2b(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_bad_records_become_padding_in_place(tmp_path, tokenizer, tokenizer_folder, reference):
    write_source(tmp_path / "a", "a", tokenizer, {"train": make_records("a", 70)})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 31)})
    damage(tmp_path / "a", (1, 4, 6))
    iterator = mixture.make_train_iterator(make_config(tmp_path, tokenizer_folder), tokenizer)
    batches = [next(iterator) for _ in range(24)]
    warnings = list(iterator.warnings)
    iterator.close()
    reasons = {}
    for batch, whole in zip(batches, reference[0], strict=True):
        assert batch.sample_ids == whole.sample_ids
        masked_tokens = (batch.arrays["segment_ids"] == 0) & (whole.arrays["segment_ids"] != 0)
        masked_patches = (batch.arrays["patch_segment_ids"] == 0) & (whole.arrays["patch_segment_ids"] != 0)
        assert batch.counters["failed/a"] == sum(i in ("a/1", "a/4", "a/6") for i in batch.sample_ids)
        assert bool(masked_tokens.any()) == bool(batch.counters["failed/a"])
        for name, value in whole.arrays.items():
            if name == "row_hash":
                continue
            mask = masked_patches if "patch" in name else masked_tokens
            np.testing.assert_array_equal(batch.arrays[name][~mask], value[~mask], err_msg=name)
        assert not batch.arrays["text_loss_mask"][masked_tokens].any()
        assert not batch.arrays["visual_mask"][masked_tokens].any()
        for key, count in batch.counters.items():
            if key.startswith("failed_reason/"):
                reasons[key] = reasons.get(key, 0) + count
    assert set(reasons) == {
        "failed_reason/truncated_image",
        "failed_reason/not_a_record",
        "failed_reason/cost_mismatch",
    }
    assert sum(reasons.values()) == len(warnings)
    assert any("train-00000-of-00002.array_record: record 4: not_a_record" in warning for warning in warnings)


@pytest.mark.parametrize("counted", [True, False])
def test_damaged_block_of_a_file(tmp_path, tokenizer, tokenizer_folder, counted):
    """Also of a folder of version 0.1.0, whose manifest does not say how many records a file has."""
    write_source(tmp_path / "a", "a", tokenizer, {"train": make_records("a", 70)})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 31)})
    if not counted:
        manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
        for entry in manifest["files"].values():
            del entry["records"]
        (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "b" / "train-00000-of-00002.array_record"
    content = bytearray(path.read_bytes())
    target = content.find(records.serialize(make_records("b", 3)[1])[-2000:-1000])  # inside the PNG, stored as it is
    position = target if target > 0 else len(content) // 3
    content[position] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"the content of .*b/train-00000-of-00002\.array_record is not the one that"):
        take(mixture.make_train_iterator(make_config(tmp_path, tokenizer_folder), tokenizer), 24)
    by_size = make_config(tmp_path, tokenizer_folder, data__verify_digests=False)
    batches = take(mixture.make_train_iterator(by_size, tokenizer), 24)
    failed = sum(batch.counters["failed/b"] for batch in batches)
    assert 0 < failed < sum(batch.counters["samples/b"] for batch in batches)
    assert sum(batch.counters.get("failed_reason/unreadable_record", 0) for batch in batches) == failed


def test_too_many_failures_stop_the_run(tmp_path, tokenizer, tokenizer_folder, monkeypatch):
    write_source(tmp_path / "a", "a", tokenizer, {"train": make_records("a", 70)})
    write_source(tmp_path / "b", "b", tokenizer, {"train": make_records("b", 31)})
    damage(tmp_path / "a", (1, 4, 6))
    monkeypatch.setattr(mixture, "FAILED_MIN_SAMPLES", 100)
    iterator = mixture.make_train_iterator(
        make_config(tmp_path, tokenizer_folder, data__max_failed_share=0.01), tokenizer
    )
    count = 0
    with pytest.raises(
        ValueError,
        match=r"of source 'a' could not be read, more than data\.max_failed_share 0\.01; the first: .*: rec",
    ):
        for batch in iterator:
            count += len(batch.sample_ids)
            assert count < 400
    assert count >= 100 - 60  # not before the share means something
    iterator.close()


def test_other_errors_name_file_and_record(folders, tokenizer, tokenizer_folder, monkeypatch):
    def broken(*_):
        raise KeyError("a fault of the program")

    monkeypatch.setattr(mixture, "deserialize", broken)
    iterator = mixture.make_train_iterator(make_config(folders, tokenizer_folder), tokenizer)
    with pytest.raises(RuntimeError, match=r"train-0000\d-of-00002\.array_record: record \d+: KeyError"):
        next(iterator)
    iterator.close()


def test_images_keep_their_aspect_ratio(folders, tokenizer, tokenizer_folder, reference):
    made = {
        f"{name}/{i}": record
        for name, count in (("a", 70), ("b", 31))
        for i, record in enumerate(make_records(name, count))
    }
    seen = set()
    for batch in reference[0]:
        ids = iter(batch.sample_ids)
        for row in range(8):
            expected = []
            for _ in range(int(batch.arrays["segment_ids"][row].max())):
                images = [s for s in made[next(ids)].segments if isinstance(s, ImageSegment)]
                expected += [records.image_grid(s.height, s.width, SPEC) for s in images]
            segments, grid = batch.arrays["patch_segment_ids"][row], batch.arrays["patch_grid"][row]
            assert [tuple(grid[segments == i + 1][0].tolist()) for i in range(segments.max())] == expected
            at_boi = [tuple(g) for g in batch.arrays["boi_grid"][row].tolist() if any(g)]
            assert at_boi == [(height // 2, width // 2) for height, width in expected]
            seen |= set(expected)
    assert len(seen) > 4


def test_state_of_another_shard_count_is_refused(folders, tokenizer, tokenizer_folder):
    iterator = mixture.make_train_iterator(make_config(folders, tokenizer_folder), tokenizer)
    with pytest.raises(ValueError, match=r"does not fit data\.num_data_shards 4"):
        iterator.set_state({"position": np.zeros((8, 2), np.int64), "batch": 0})
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_sources_are_checked_at_open(tmp_path, folders, tokenizer, tokenizer_folder):
    def opened(folder):
        config = make_config(folders, tokenizer_folder)
        broken = {**config.data.sources, "a": dataclasses.replace(config.data.sources["a"], path=str(folder))}
        mixture.make_train_iterator(
            dataclasses.replace(config, data=dataclasses.replace(config.data, sources=broken)), tokenizer
        )

    with pytest.raises(ValueError, match=r"data\.sources\.a\.path: folder .*missing does not exist"):
        opened(tmp_path / "missing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare.manifest\.json does not exist"):
        opened(tmp_path / "bare")
    write_source(tmp_path / "empty", "a", tokenizer, {"train": []})
    with pytest.raises(ValueError, match="holds no training record"):
        opened(tmp_path / "empty")
    for damage in ({"files": []}, {"files": {"train-00000-of-00002.array_record": 3}}, {"num_records": 6}):
        path = write_source(tmp_path / "damaged", "a", tokenizer, {"train": make_records("a", 6)}) / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(ValueError, match=r"damaged.manifest\.json lacks num_records or files"):
            opened(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")
    cut = (
        write_source(tmp_path / "cut", "a", tokenizer, {"train": make_records("a", 6)})
        / "train-00001-of-00002.array_record"
    )
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.array_record has \d+ bytes, manifest\.json says \d+"):
        opened(tmp_path / "cut")
    cut.unlink()
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.array_record is missing"):
        opened(tmp_path / "cut")


@pytest.mark.parametrize(("split", "turns"), [("train", "branches"), ("val", "branches"), ("train", "repeated_prefix")])
def test_the_command_for_a_missing_index_makes_it(tmp_path, folders, tokenizer, tokenizer_folder, split, turns):
    """The printed command, run as it stands, with a folder whose name a shell would split."""
    folder = write_source(
        tmp_path / "an other", "a", tokenizer, {split: make_records("a", 6)} | {"train": make_records("a", 6)},
        spec=ImageSpec(4, 8, 64) if turns == "branches" else SPEC,
    )  # fmt: skip
    config = make_config(folders, tokenizer_folder, data__turns=turns)
    sources = {"a": dataclasses.replace(config.data.sources["a"], path=str(folder))}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))

    def opened():
        if split == "val":
            next(mixture.validation_batches(config, tokenizer, "a"))
        else:
            mixture.make_train_iterator(config, tokenizer).close()

    with pytest.raises(ValueError, match=r"no index of lengths .*run: python -m data_pipelines\.index ") as caught:
        opened()
    _, _, command = str(caught.value).partition("run: ")
    assert index_command.main(shlex.split(command)[3:]) == 0
    opened()


def test_repeated_prefixes_are_planned_by_their_cost(tmp_path, tokenizer, tokenizer_folder, caplog):
    """Every sample takes what its index says (else it is masked, with a warning), and nothing but prefixes repeats."""
    image = ImageSegment(png(48, 48), 48, 48)
    made = [
        Record("t", "vqa", (image, *(TextSegment(f"{k} is", bool(k % 2), k) for k in range(1, 2 + i % 4))), {"id": i})
        for i in range(40)
    ]
    write_source(tmp_path / "t", "t", tokenizer, {"train": made, "val": made})
    source = {"t": {"path": str(tmp_path / "t"), "weight": 1.0, "augment": "none"}}
    targets, positions, patches = [], [], []
    for turns in ("branches", "repeated_prefix"):
        build_index(tmp_path / "t", tokenizer, SPEC, turns)
        config = make_config(tmp_path, tokenizer_folder, data__sources=source, data__turns=turns)
        batches = list(mixture.validation_batches(config, tokenizer, "t"))
        tokens = [batch["tokens"][batch["text_loss_mask"]] for batch in batches]
        targets.append(sorted(np.concatenate(tokens).tolist()))
        positions.append(sum(int((batch["segment_ids"] > 0).sum()) for batch in batches))
        patches.append(sum(int((batch["patch_segment_ids"] > 0).sum()) for batch in batches))
    assert not caplog.records
    assert targets[0] == targets[1] != [] and patches == [40 * 36] * 2
    num_repeats, prefix = sum(i % 4 for i in range(40)), 9 + 2  # 3 x 3 visual tokens and two markers
    assert positions[1] - positions[0] == prefix * num_repeats


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_validation_takes_every_item_once(folders, tokenizer, tokenizer_folder, batch_rows):
    config = make_config(folders, tokenizer_folder, eval__validation_rows=0, eval__batch_rows=batch_rows)
    batches = list(mixture.validation_batches(config, tokenizer, "a"))
    assert all(batch["tokens"].shape == (batch_rows, 160) for batch in batches)
    rows = np.concatenate([batch["row_hash"] for batch in batches])
    full = [row for batch in batches for row in range(batch_rows) if batch["segment_ids"][row].any()]
    assert len(rows) - len(full) < batch_rows
    found = []
    for batch in batches:
        for tokens, segments, visual in zip(batch["tokens"], batch["segment_ids"], batch["visual_mask"], strict=True):
            for number in range(1, segments.max() + 1):
                found.append(tokenizer.decode(tokens[(segments == number) & ~visual]))
    expected = [
        "".join(s.text for s in record.segments if isinstance(s, TextSegment)) for record in make_records("v", 23)
    ]
    assert sorted(found) == sorted(expected)
    other_seed = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=9))
    again = np.concatenate([batch["row_hash"] for batch in mixture.validation_batches(other_seed, tokenizer, "a")])
    np.testing.assert_array_equal(rows, again)


def test_validation_can_be_bounded_or_empty(folders, tokenizer, tokenizer_folder):
    config = make_config(folders, tokenizer_folder, eval__validation_rows=3, eval__batch_rows=2)
    batches = list(mixture.validation_batches(config, tokenizer, "a"))
    assert [int(batch["segment_ids"].any(axis=1).sum()) for batch in batches] == [2, 1]
    assert list(mixture.validation_batches(config, tokenizer, "b")) == []
    with pytest.raises(ValueError, match=r"data\.sources has no 'c'"):
        next(mixture.validation_batches(config, tokenizer, "c"))
