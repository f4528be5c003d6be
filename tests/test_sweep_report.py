"""The page of a sweep: verdicts, arms, curves and runs as the table has them, and nothing that could run."""

import html.parser

import numpy as np
import pytest

from unihetero_jax import claims, report
from unihetero_jax.cli import main

SEEDS = 8


class Text(html.parser.HTMLParser):
    """The tables of a page, row by row, and its images."""

    def __init__(self):
        super().__init__()
        self.rows, self.images, self.tags, self.is_in_cell = [], [], set(), False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_in_cell = True
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        if self.is_in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.is_in_cell = False


def table_of(effects, **more):
    rng = np.random.default_rng(0)
    level = rng.normal(0.7, 0.05, SEEDS)
    values = {"base": level} | {arm: level - e + rng.normal(0, 0.004, SEEDS) for arm, e in effects.items()} | more
    found = {"answer_nll": {arm: dict(enumerate(map(float, own))) for arm, own in values.items()}}
    found["collapsed"] = {arm: {seed: float(arm == "bad") for seed in range(SEEDS)} for arm in values}
    found["pflop"] = {arm: dict.fromkeys(range(SEEDS), 0.25) for arm in values}
    return found


def registered(arms, **changes):
    values = {"metric": "answer_nll", "margin": 0.02, "num_seeds": SEEDS,
              "contrasts": {f"{arm} <helps>": [arm, "base"] for arm in arms}} | changes  # fmt: skip
    return claims.Registered(claims.parse_protocol(values, "here"), {}, "")


def page_of(table, about):
    findings = claims.verify(table, about.protocol)
    text = Text()
    text.feed(report.render(table, about, findings, "", "A <sweep>"))
    return text


def test_the_page_has_every_contrast_arm_and_run():
    table = table_of({"good": 0.1, "none": 0.0, "bad": 0.1})
    page = page_of(table, registered(("good", "none", "bad")))
    verdicts = {row[0]: row for row in page.rows if row[0].endswith("<helps>")}
    assert [verdicts[f"{arm} <helps>"][-1] for arm in ("good", "none", "bad")] == [
        "supported", "not supported", f"collapsed in {SEEDS} of {SEEDS}",
    ]  # fmt: skip
    mean = np.mean(list(table["answer_nll"]["good"].values()))
    (arm,) = [row for row in page.rows if row[0] == "good" and len(row) == 5]
    assert arm[1] == "8" and arm[2].startswith(f"{mean:.4f} ± ") and arm[3:] == ["0 of 8", "0.25"]
    runs = [row for row in page.rows if len(row) == 4 and row[1].isdigit() and row[0] != "arm"]
    assert len(runs) == 4 * SEEDS and sum(row[3] == "yes" for row in runs) == SEEDS
    assert len(page.images) == 2 and all(one["src"].startswith("data:image/png") and one["alt"] for one in page.images)
    assert not page.tags & {"script", "iframe", "link"}


def test_a_sweep_without_a_protocol_has_a_page_without_verdicts(tmp_path):
    rows = "".join(f"a,{seed},{metric},0.5\n" for seed in range(2) for metric in ("accuracy/q", "held_out/qa/text"))
    (tmp_path / "table.csv").write_text("arm,seed,metric,value\n" + rows)
    assert main(["report", f"--results={tmp_path / 'table.csv'}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "held_out/qa/text, the lower the better" in page and "the protocol has no contrasts" in page
    assert "Margin" not in page and "by hand" not in page


def test_failure_signatures_are_those_that_were_planted():
    """A pixel arm that harms, a curve of understanding that flattens at its end, rollouts of the contrast's arm."""
    table = table_of({"pixel_through": -0.1})
    for size, loss in ((100, 0.8), (200, 0.6), (400, 0.59)):
        table["answer_nll"][f"understanding@{size}"] = {seed: loss + seed / 1000 for seed in range(SEEDS)}
    planted = {"control": (0.5, 1.0), "pixel_through": (0.01, 60.0)}
    table["rollout_error/growth"] = {
        arm: {seed: growth + 0.001 * (-1) ** seed for seed in range(SEEDS)} for arm, (growth, _) in planted.items()
    }
    for name, values in (("horizon", [horizon for _, horizon in planted.values()]), ("num_positions", [64.0, 64.0])):
        table[f"rollout_error/{name}"] = {
            arm: dict.fromkeys(range(SEEDS), value) for arm, value in zip(planted, values, strict=True)
        }
    table["accuracy/q"] = {"base": {0: 0.8}}
    table["accuracy/q_heldout"] = {"base": {0: 0.79}}
    table["answer_nll"]["understanding"] = table["answer_nll"].pop("base")
    about = registered((), contrasts={"pixels help": ["pixel_through", "understanding"]})
    found = {row[0]: row[1:] for row in page_of(table, about).rows if len(row) == 4}
    effect, threshold, shows = found["understanding under pixel-level generation"]
    assert (
        effect.startswith("pixel_through against understanding: effect -0.09")
        and threshold == "interval below -0.02"
        and shows == "shows"
    )
    assert found["scaling of understanding-only data"] == [
        "understanding: from 200 to 400 the loss falls by 1.7% for each doubling", "less than 5%", "shows",
    ]  # fmt: skip
    grows, _, shows = found["error accumulation over long sequences"]
    assert grows.startswith("pixel_through: error grows by 0.0100 (0.0091 to 0.0109)") and shows == "shows"
    assert "after 60 of 64 positions" in grows
    assert found["generalisation across data kinds"][2] == "does not show"


def test_the_best_model_size_of_each_budget_is_where_it_was_planted():
    """Parabolas in the logarithm of the size: one with its vertex among the sizes, one beyond, one without."""
    sizes = {f"d{width}": float(1e5 * 4**number) for number, width in enumerate((32, 64, 128, 256))}
    planted = {"a@100GFLOP": (8e5, 0.1), "a@400GFLOP": (6e7, 0.1), "b@100GFLOP": (8e5, -0.1)}
    table = table_of({})
    table["parameters"] = {}
    for curve, (best, curvature) in planted.items():
        for name, size in sizes.items():
            arm, loss = f"{curve}-{name}", 0.5 + curvature * np.log(size / best) ** 2
            table["answer_nll"][arm] = {seed: loss + 0.01 * (-1) ** seed for seed in range(SEEDS)}
            table["parameters"][arm] = dict.fromkeys(range(SEEDS), size)
    page = page_of(table, registered(()))
    found = {(row[0], row[1]): row[2:] for row in page.rows if row[1:2] in (["100"], ["400"])}
    assert found["a", "100"] == ["4", "800,000 parameters, 0.5000"]
    assert found["a", "400"][1].startswith("60,000,000 parameters") and "outside of the sizes" in found["a", "400"][1]
    assert "no minimum over these model sizes" in found["b", "100"][1]
    assert not [row for row in page.rows if len(row) == 4 and row[0] == "base" and "parameters" in row[3]]


def test_a_wrong_control_stands_before_everything_else():
    table = table_of({"good": 0.1, "planted": 0.0})
    about = registered(("good", "planted"), positive=["planted <helps>"])
    text = report.render(table, about, claims.verify(table, about.protocol), "", "x")
    warning = "Withheld:</b> planted &lt;helps&gt; (positive control) is not supported"
    assert warning in text and text.index(warning) < text.index("<table>")
    assert "withheld" in text[text.index("good &lt;helps&gt;") :]


def test_arms_of_several_sizes_become_curves_with_their_laws():
    sizes = (1e3, 2e3, 4e3, 8e3, 1.6e4, 3.2e4)
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.001, (2, len(sizes), SEEDS))
    laws = {"slow": lambda d: 0.2 + 20 * d**-0.4, "fast": lambda d: 0.2 + 20 * (2 * d) ** -0.4}
    more = {
        f"{name}@{int(size)}": law(size) * (1 + noise[i, j])
        for i, (name, law) in enumerate(laws.items()) for j, size in enumerate(sizes)
    }  # fmt: skip
    table = table_of({"good": 0.1}, **more, **{"lone@7": np.ones(SEEDS)})
    curves = report.curves_of(table, "answer_nll")
    assert curves.keys() == {"slow", "fast"} and curves["slow"].losses.shape == (6, SEEDS)
    found = {(name, quantity.partition(" at ")[0]): value for name, quantity, value in report.describe_curves(curves)}
    multiplier = found["fast", "data multiplier against slow"]
    value, low, high = (float(part) for part in multiplier.replace("(", "").replace(")", "").replace("to ", "").split())
    assert low < 2.0 < high and value == pytest.approx(2.0, rel=0.1), multiplier
    assert float(found["slow", "alpha"].split()[0]) == pytest.approx(0.4, abs=0.05)
    assert len(page_of(table, registered(("good",))).images) == 3
    few = {f"short@{size}": np.full(SEEDS, 1.0 / size) for size in (10, 20)}
    short = report.curves_of(table_of({}, **few), "answer_nll")
    assert "a law needs 4: 2 more are missing" in next(report.describe_curves(short))[2]


def test_the_command_writes_it_beside_the_table(tmp_path, capsys):
    lines = ["arm,seed,metric,value"]
    for metric, by_arm in table_of({"good": 0.1}).items():
        lines += [f"{arm},{seed},{metric},{value}" for arm, own in by_arm.items() for seed, value in own.items()]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    (tmp_path / "protocol.json").write_text(
        '{"metric": "answer_nll", "margin": 0.02, "num_seeds": 8, "contrasts": {"good helps": ["good", "base"]}}'
    )
    assert main(["report", f"--results={tmp_path / 'results.csv'}", "--title=Mine"]) == 0
    assert f"see {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert "<h1>Mine</h1>" in (tmp_path / "report.html").read_text()
    protocol = (tmp_path / "protocol.json").read_text().replace('"base"]', '"lost"]')
    (tmp_path / "protocol.json").write_text(protocol)
    assert main(["report", f"--results={tmp_path / 'results.csv'}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "contrast good helps: no runs of lost" in page and "Means over seeds" in page, "arms stand without verdicts"
    assert main(["report", f"--results={tmp_path / 'nothing.csv'}"]) == 2
    assert "no such file" in capsys.readouterr().err
