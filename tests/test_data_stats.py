"""What `data-stats` says of a mixture and of a run, against counts made by hand."""

import dataclasses
import json

import numpy as np
import pytest

from tests.test_mixture import folders, make_config, tokenizer, tokenizer_folder  # noqa: F401 - fixtures
from unihetero_jax import cli, data_stats
from unihetero_jax.config import to_dict
from unihetero_jax.data import mixture
from unihetero_jax.data.tokenizer import load_tokenizer


def test_lengths_are_those_of_the_indices(folders, tokenizer_folder):  # noqa: F811
    config = make_config(folders, tokenizer_folder, data__row_tokens=36)
    lengths, costs = data_stats.mixture_lengths(config)
    for name in "ab":
        index = np.load(next((folders / name / "index").glob("*.train.npy")))
        found = lengths[name]
        assert found.num_records == len(index) and found.num_too_long == (index["num_tokens"] > 36).sum() > 0
        assert found.mean_tokens == pytest.approx(index["num_tokens"].mean())
        assert found.mean_patches == pytest.approx(index["num_patches"].mean())
    assert lengths["a"].share == pytest.approx(0.75, abs=1e-6)
    assert costs[:, 0].max() <= 36 and 100 < len(costs) <= 4 * 42


def test_what_does_not_fit_and_what_a_schedule_does_are_told(folders, tokenizer_folder):  # noqa: F811
    config = make_config(folders, tokenizer_folder, data__row_patches=36, data__planned_draws=8_000)
    sources = {
        name: dataclasses.replace(source, weight=1.0, weight_schedule=((0.0, 1.0 - up), (1.0, up)))
        for (name, source), up in zip(config.data.sources.items(), (1.0, 0.0), strict=True)
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    lengths, _ = data_stats.mixture_lengths(config)
    assert all(source.share == pytest.approx(0.5, abs=1e-9) for source in lengths.values())
    for name, source in lengths.items():
        index = mixture.open_split(config, load_tokenizer(config.data.tokenizer), name, "train").index
        is_long = (index["num_patches"] > 36) | (index["num_tokens"] > config.data.row_tokens)
        assert source.num_too_long == int(is_long.sum())


def test_the_proposed_row_size_costs_no_rows():
    rng = np.random.default_rng(0)
    with_image = rng.random(4000) < 0.6
    tokens = rng.integers(20, 300, 4000)
    costs = np.stack([tokens + 64 * with_image, 256 * with_image], axis=-1)
    sizes, proposed = data_stats.row_sizes(costs, 4096)
    by_size = {size.row_patches: size for size in sizes}
    largest = sizes[-1]
    assert by_size[proposed].token_padding < largest.token_padding + 0.005
    assert by_size[proposed].patch_padding < 0.06 < largest.patch_padding
    assert data_stats.row_sizes(costs * (1, 0), 4096) == ([], 0)


def test_totals_of_a_run_are_printed(folders, tokenizer, tokenizer_folder, tmp_path, capsys):  # noqa: F811
    config = make_config(folders, tokenizer_folder)
    stream = mixture.make_train_iterator(config, tokenizer)
    totals: dict[str, int] = {}
    seen = []
    for _ in range(20):
        batch = next(stream)
        seen += batch.sample_ids
        for name, value in batch.counters.items():
            totals[name] = totals.get(name, 0) + value
    stream.close()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    lines = [json.dumps({"step": 20, "totals": totals}), '{"step": 21, "totals": {"samp']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert cli.main(["data-stats", f"--workdir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "drawn up to step 20" in printed and "data.row_patches 144 is set" in printed
    rows = {
        line.split()[0]: line.split()
        for line in printed.split("drawn up to")[1].splitlines()
        if line[:2] in ("a ", "b ")
    }
    for name, size in (("a", 70), ("b", 31)):
        mine = [sample for sample in seen if sample.startswith(name)]
        assert int(rows[name][1].replace(",", "")) == len(mine)
        assert int(rows[name][2]) == min(len(mine), size) == len(set(mine))
        assert float(rows[name][3]) == pytest.approx(len(mine) / size, abs=0.01)
        assert int(rows[name][5].replace(",", "")) == totals[f"text_targets/{name}"]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert cli.main(["data-stats", f"--workdir={tmp_path}"]) == 2
    assert "no metrics.jsonl; train first" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    assert cli.main(["data-stats", f"--workdir={tmp_path}"]) == 2
    assert "no line with totals yet" in capsys.readouterr().err
