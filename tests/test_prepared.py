"""Reading prepared folders: every record with its place, even samples, and damage that is named."""

import json

import pytest

from data_pipelines.prepared import count_records, read_manifest, read_shards, read_stored, shards_of
from data_pipelines.writer import write_prepared
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared")
    samples = [Record("set", "text", (TextSegment(f"text {n}", True),), {"id": str(n)}) for n in range(23)]
    tokenizer = train_tokenizer(["text 0123456789"], 280, path / "tokenizer")
    write_prepared(samples, path / "set", source="set", tokenizer=tokenizer, spec=ImageSpec(8, 4, 16), licence="CC0",
                   num_shards=3)  # fmt: skip
    return path / "set"


def test_all_records_come_in_order_with_their_places(folder):
    stored = list(read_stored(folder, "train"))
    assert [s.number for s in stored] == list(range(23))
    assert sorted(int(s.record.meta["id"]) for s in stored) == list(range(23))
    assert all(records.serialize(s.record) == s.data for s in stored)
    sizes = [count_records(shard) for shard in shards_of(folder, "train")]
    names = [f"train-{i:05d}-of-00003.array_record" for i in range(3)]
    assert [s.where for s in stored] == [
        f"{name}[{n}]" for name, size in zip(names, sizes, strict=True) for n in range(size)
    ]
    assert list(read_stored(folder, "val")) == []
    by_shard = [(shard.name, [s.number for s in of_shard]) for shard, of_shard in read_shards(folder, "train")]
    assert [name for name, _ in by_shard] == names
    assert [number for _, numbers in by_shard for number in numbers] == list(range(23))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (4, [0, 5, 11, 17]), (23, list(range(23))), (100, list(range(23))), (0, list(range(23)))],
)
def test_a_sample_is_evenly_spaced(folder, count, expected):
    everything = list(read_stored(folder, "train"))
    assert list(read_stored(folder, "train", count)) == [everything[number] for number in expected]


def test_damage_is_named(folder, tmp_path):
    copy = tmp_path / "set"
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    shard = shards_of(copy, "train")[1]
    content = shard.read_bytes()
    record = next(of_shard for file, of_shard in read_shards(copy, "train") if file == shard)
    place = content.index(next(record).data)
    shard.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
    with pytest.raises(ValueError, match=r"train-00001-of-00003.array_record.*prepare the folder again"):
        list(read_stored(copy, "train"))
    shard.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.array_record is no readable ArrayRecord file"):
        list(read_stored(copy, "train"))
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.array_record is no readable ArrayRecord file"):
        list(read_stored(copy, "train"))


@pytest.mark.parametrize(
    "field", ["source", "licence", "num_records", "dropped", "dropped_examples", "files", "settings"]
)
def test_a_manifest_has_every_field(folder, tmp_path, field):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert read_manifest(folder) == manifest
    for content in (manifest | {field: 3}, {name: value for name, value in manifest.items() if name != field}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"no readable manifest.json \(its {field} is"):
            read_manifest(tmp_path)


def test_what_is_no_prepared_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is missing or has no readable manifest\.json"):
        shards_of(tmp_path, "train")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, no object"):
        list(read_stored(tmp_path, "train"))
