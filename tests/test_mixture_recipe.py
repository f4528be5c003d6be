"""The recipe of 200M public samples: its sums, its twins, its commands, and what its dry run says."""

import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import convert
from experiments import base, pretrain_200m
from experiments.mixtures import public_200m
from experiments.mixtures.public_200m import SOURCES
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment, record_cost
from unihetero_jax.flops import parameter_counts

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "webdataset", "web_metadata", "coco", "cc_tsv", "interleaved", "llava", "parquet", "jsonl", "text", "tfds",
    "image_only",
}  # fmt: skip
BY_NAME = {source.name: source for source in SOURCES}
GENERATED = {
    "recap_datacomp": 0.5, "coyo": 0.3, "cc12m": 0.3, "blip3o_long": 0.5, "textatlas": 0.5, "docmatix": 0,
    "obelics": 0.8, "mmc4_core": 0.9, "llava_665k": 0, "mammoth_vl": 0, "finevision": 0, "open_images": 1,
    "imagenet_w21": 1, "fineweb_edu": 0,
}  # fmt: skip
"""Share of each source's images that carry the visual loss, by hand from its role."""


def bash(script, folder, *options):
    """Runs a shell script in a folder, with this interpreter as `python`."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return subprocess.run(
        ["bash", *options], input=script, cwd=folder, text=True, capture_output=True, env={**os.environ, "PATH": path}
    )


def printed(capsys, *arguments):
    assert public_200m.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_pass_has_exactly_200m_samples():
    draws = [source.count * source.epochs for source in SOURCES]
    assert sum(draws) == 200_000_000
    assert all(draw == int(draw) > 0 for draw in draws)
    assert len(BY_NAME) == len(SOURCES)


@pytest.mark.parametrize("scale", ["1", "10", "1000"])
def test_weights_are_the_shares_of_draws_at_every_scale(scale):
    weights = {name: source["weight"] for name, source in public_200m.sources(scale).items()}
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    draws = {s.name: public_200m.scaled_count(s, scale) * s.epochs for s in SOURCES}
    for name, draw in draws.items():
        assert weights[name] == pytest.approx(draw / sum(draws.values()), rel=1e-3), name
        assert abs(public_200m.scaled_count(BY_NAME[name], scale) - BY_NAME[name].count / int(scale)) <= 0.5


def test_a_twin_has_the_roles_and_other_folders():
    whole, twin = public_200m.sources(), public_200m.sources("1000")
    for name, source in whole.items():
        assert {**twin[name], "path": ""} == {**source, "path": ""}
        assert source["path"] == f"data/public-200m/{name}"
        assert twin[name]["path"] == f"data/public-200m-1-1000/{name}"
    with pytest.raises(ValueError, match="scale '7': there are 1, 10, 1000"):
        public_200m.sources("7")


def test_a_small_count_is_rounded_and_never_zero():
    tiny = dataclasses.replace(SOURCES[0], count=1499)
    assert [public_200m.scaled_count(tiny, scale) for scale in ("1", "10", "1000")] == [1499, 150, 1]
    assert public_200m.scaled_count(dataclasses.replace(tiny, count=3), "1000") == 1


def test_the_pretraining_takes_a_pass_of_each_scale():
    steps = {}
    for scale in public_200m.SCALES:
        config = from_config_dict(pretrain_200m.get_config(scale))
        assert config.data.sources["coyo"].path == public_200m.sources(scale)["coyo"]["path"]
        steps[scale] = config.train.num_steps
    assert steps["1"] / steps["10"] == pytest.approx(10, rel=1e-3)
    assert steps["1"] / steps["1000"] == pytest.approx(1000, rel=1e-2)
    assert 400e6 < parameter_counts(config.model, config.objective)["total"] < 600e6
    with pytest.raises(ValueError, match="scale '7'"):
        pretrain_200m.get_config("7")


def test_an_experiment_takes_the_sources():
    values = base.get_config().to_dict()
    values["data"]["sources"] = public_200m.sources()
    resolved = from_config_dict(values).data.sources
    assert resolved.keys() == BY_NAME.keys()
    assert resolved["coyo"].order == "coin" and resolved["coyo"].text_first_share == 0.3
    assert resolved["open_images"].visual_loss == "all"
    assert resolved["llava_665k"].max_epochs == 3 and resolved["obelics"].max_epochs == 2


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_says_what_it_is_and_how_it_is_made(source):
    assert source.title and source.licence
    assert source.url.startswith("https://")
    assert 0 < source.count <= source.published
    assert source.layout in LAYOUTS
    pins = re.findall(r"--revision=(\S+)", source.fetch)
    if "huggingface.co" in source.url:
        assert pins == ([source.revision] if source.revision else [])
        assert source.revision == "" or re.fullmatch("[0-9a-f]{40}", source.revision)
        assert source.url.removeprefix("https://huggingface.co/datasets/") in source.fetch
    assert (source.revision == "") == any(fact.startswith("revision") for fact in source.unverified)
    assert source.verified == (source.unverified == ())


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_commands_are_shell_and_name_what_they_should(source, tmp_path):
    prepare = public_200m.prepare_command(source)
    for command in (source.fetch, prepare, public_200m.prepare_command(source, "1000")):
        checked = bash(command, tmp_path, "-n")
        assert (checked.returncode, checked.stderr) == (0, ""), command
    assert f"raw/{source.name}" in source.fetch
    assert source.inputs.startswith(f"raw/{source.name}/")
    assert prepare.startswith(f"python -m data_pipelines.convert {source.layout} --input '{source.inputs}' ")
    assert f" --output={public_200m.sources()[source.name]['path']} " in prepare
    assert source.flags in prepare and f'--licence="{source.licence}"' in prepare


def test_number_of_files_follows_the_bytes():
    source = dataclasses.replace(SOURCES[0], count=1_000_000, bytes_per_sample=90_000)
    assert " --num-shards=45 " in public_200m.prepare_command(source)
    assert " --num-shards=1 " in public_200m.prepare_command(source, "1000")
    assert " --output=data/public-200m-1-1000/recap_datacomp " in public_200m.prepare_command(source, "1000")


def test_urls_of_obelics_come_out_of_their_lists(tmp_path):
    docs = tmp_path / "raw" / "obelics" / "opt_out_docs_removed_2023_07_12"
    docs.mkdir(parents=True)
    pq.write_table(pa.table({"images": [["http://a/1", None], [], [None, "http://b/2"]]}), docs / "train-000.parquet")
    ran = bash(public_200m._OBELICS_URLS, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert pq.read_table(tmp_path / "raw/obelics/urls/train-000.parquet").to_pydict() == {
        "url": ["http://a/1", "http://b/2"]
    }


def test_image_map_lists_what_was_fetched(tmp_path):
    images = tmp_path / "raw" / "set" / "images"
    images.mkdir(parents=True)
    columns = {
        "url": ["http://a/1", "http://gone", "http://c d", "http://e/4"],
        "key": ["000000000", "000000001", "000000002", "000120003"],
        "status": ["success", "failed_to_download", "success", "success"],
    }
    pq.write_table(pa.table(columns), images / "00000.parquet")
    ran = bash(public_200m._image_map("set"), tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    expected = "http://a/1\t00000/000000000.jpg\nhttp://e/4\t00012/000120003.jpg\n"
    assert (tmp_path / "raw/set/images.tsv").read_text() == expected


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"order": "coin", "text_first_share": 0.25, "visual_loss": "generated"}, 0.25),
        ({"order": "text_first", "visual_loss": "generated"}, 1),
        ({"order": "image_first", "visual_loss": "generated"}, 0),
        ({"order": "stored", "stored_after_text": 0.7, "visual_loss": "generated"}, 0.7),
        ({"order": "image_first", "visual_loss": "all"}, 1),
        ({"order": "coin", "text_first_share": 0.25, "visual_loss": "none"}, 0),
        ({"order": "stored", "visual_loss": "all", "images": 0}, 0),
    ],
)
def test_share_of_images_that_carry_the_visual_loss(changes, share):
    assert dataclasses.replace(SOURCES[0], **changes).generated_share == share


def test_positions_of_a_sample_are_what_the_planner_charges():
    text, image = TextSegment("ten tokens", True), ImageSegment(b"", 512, 512)
    spec = ImageSpec(16, 64, 1024)
    assert public_200m.IMAGE_SPEC == "--patch-size=16 --min-patches=64 --max-patches=1024"
    tokens, _ = record_cost(Record("s", "interleaved", (image, text, image)), lambda _: range(10), spec)
    source = dataclasses.replace(SOURCES[0], count=1, epochs=1, text_tokens=10, images=2)
    cost = public_200m.cost_of(source)
    assert (cost.text, cost.visual, cost.positions) == (10, 512, tokens)


def test_cost_counts_draws_and_disk_counts_records():
    source = dataclasses.replace(
        SOURCES[0], count=1000, epochs=2, text_tokens=10, images=1.5, bytes_per_sample=7, text_first_share=0.5
    )
    cost = public_200m.cost_of(source, "10", image_tokens=20)
    assert cost == public_200m.Cost(
        samples=200, disk=700, text=2000, visual=6000, positions=2000 + 200 * 1.5 * 22 + 200, generating=100,
        generated=3000,
    )  # fmt: skip
    assert public_200m.total([cost, cost]).positions == 2 * cost.positions


def test_dry_run_states_the_sums(capsys):
    output = printed(capsys, "--row-tokens=1024", "--batch-rows=64", "--image-tokens=100")
    text = sum(s.count * s.epochs * s.text_tokens for s in SOURCES)
    visual = sum(s.count * s.epochs * s.images * 100 for s in SOURCES)
    markers = sum(s.count * s.epochs * (2 * s.images + 1) for s in SOURCES)
    positions = text + visual + markers
    assert re.search(r"samples of a pass +200,000,000\n", output)
    assert f"{text / 1e9:.4g} B text, {visual / 1e9:.4g} B visual, {positions / 1e9:.4g} B positions" in output
    assert f"{sum(s.count * s.bytes_per_sample for s in SOURCES) / 1e12:.4g} TB" in output
    (steps,) = re.findall(r"training steps +([\d,]+) of 64 rows of 1024", output)
    assert steps == f"{math.ceil(positions / 65536 / 0.99):,}"


def test_dry_run_states_the_generation_share(capsys):
    assert GENERATED.keys() == BY_NAME.keys()
    draws = {name: s.count * s.epochs for name, s in BY_NAME.items()}
    visual = {name: draws[name] * s.images * 256 for name, s in BY_NAME.items()}
    positions = sum(visual.values()) + sum(draws[n] * (s.text_tokens + 2 * s.images + 1) for n, s in BY_NAME.items())
    samples = sum(draws[name] * share for name, share in GENERATED.items())
    generated = sum(visual[name] * share for name, share in GENERATED.items())
    stated = re.findall(r"generation share +([.\d]+) of samples, ([.\d]+) of visual tokens, ([.\d]+)", printed(capsys))
    expected = (samples / 200e6, generated / sum(visual.values()), generated / positions)
    assert [float(share) for share in stated[0]] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("scale", ["1", "10", "1000"])
def test_dry_run_shows_every_source(capsys, scale):
    output = printed(capsys, f"--scale={scale}")
    assert "ours, the paper's is unknown" in output
    table, _, rest = output.partition("samples of a pass")
    for source in SOURCES:
        (line,) = (line for line in table.split("\n") if line.startswith(f"{source.name} "))
        for cell in (source.part, f"{source.count // int(scale):,}", f"{source.weight:.4f}", source.visual_loss):
            assert f"  {cell}  " in line, (cell, line)
        assert line.endswith(f"  {source.licence}")
        pin = source.revision or "pin before use"
        assert re.search(rf"^ +{source.name} +{re.escape(pin)} +{re.escape(source.url)}$", rest, re.MULTILINE)
        assert all(f"unverified: {fact}" in rest for fact in source.unverified)
        assert source.fetch not in output


def test_dry_run_prints_the_commands_if_asked(capsys):
    output = printed(capsys, "--scale=10", "--commands")
    for source in SOURCES:
        assert source.fetch in output and public_200m.prepare_command(source, "10") in output


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_the_converter_takes_the_command(source):
    """And understands of it what the recipe says."""
    flags = convert._parser().parse_args(shlex.split(public_200m.prepare_command(source))[3:])
    assert (flags.layout, flags.input, flags.licence) == (source.layout, [source.inputs], source.licence)
    assert flags.output == public_200m.sources()[source.name]["path"] and flags.tokenizer == public_200m.TOKENIZER
    assert (flags.patch_size, flags.min_patches, flags.max_patches) == (16, 64, 1024)
    assert source.count * source.bytes_per_sample / flags.num_shards <= public_200m.SHARD_BYTES


@pytest.mark.parametrize("flag", ["--scale=7", "--row-tokens=0", "--batch-rows=-1", "--image-tokens=many"])
def test_bad_flags_are_refused(capsys, flag):
    with pytest.raises(SystemExit) as refused:
        public_200m.main([flag])
    assert refused.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_the_command_runs_without_jax():
    script = (
        "import sys; from experiments.mixtures import public_200m; public_200m.main([]); "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    command = [sys.executable, "-m", "experiments.mixtures.public_200m"]
    assert subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout == ran.stdout
