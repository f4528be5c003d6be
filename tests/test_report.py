"""The page about prepared folders: its figures against counts made by hand, and nothing of the data runs in it."""

import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import report
from data_pipelines.bias import measure_bias
from data_pipelines.entries import Dropped
from data_pipelines.prepared import Stored, read_stored
from data_pipelines.report_page import (
    DrawnRow,
    ShownPicture,
    ShownText,
    Span,
    _length_chart,
    escaped,
    render_page,
)
from data_pipelines.writer import write_prepared
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

SPEC = ImageSpec(8, 16, 16)
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" \x00 \u202e"


def picture(number, size=(40, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 60, 200)).save(buffer, "PNG")
    return ImageSegment(buffer.getvalue(), size[1], size[0])


def asked(number, answer, question="What color?"):
    turn = TextSegment(question, False, 1), TextSegment(f" {answer}", True, 1)
    return Record("qa", "vqa", (picture(number), *turn), {"id": f"q{number}"})


def drawn(number):
    return Record("drawn", "image", (TextSegment(f"picture number {number}", True), picture(number, (20, 60))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    tokenizer = train_tokenizer(["What color? red blue picture number 0123456789"] * 3, 300, path / "tokenizer")

    def prepare(name, samples, val_samples=()):
        write_prepared(samples, path / name, source=name, tokenizer=tokenizer, spec=SPEC, licence="CC0 <b>",
                       val_samples=val_samples)  # fmt: skip

    questions = [asked(n, "red" if n % 4 else "blue") for n in range(40)]
    prepare("qa", [*questions, *(Dropped("no_answer", f"raw[{n}] {ATTACK}") for n in range(7))], [asked(3, "green")])
    again = dataclasses.replace(drawn(0), meta={"id": "again"})
    prepare("drawn", [*(drawn(n) for n in range(30)), again])
    prepare("twin", [asked(n, "green") for n in range(40)])
    prepare("odd", [Record("odd", "text", (TextSegment(ATTACK, True),)), asked(200, ATTACK, ATTACK)])
    return path


def run(folder, *names, **changes):
    flags = {"tokenizer": folder / "tokenizer", "output": folder / "page.html", "min_patches": 16, "max_patches": 16}
    flags |= changes
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return report.main([*(str(folder / name) for name in names), *arguments])


def page_of(folder, *names, **changes):
    assert run(folder, *names, **changes) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags that were opened and closed, attributes, and the rows of every table by its caption."""

    VOID = ("meta", "img", "br", "rect", "line")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.tables, self.text = [], [], [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "caption":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "br":
            self.text += "\n"

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "caption":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "caption":
            self.caption = data
        elif "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data


def test_the_page_says_what_is_in_the_folders(folder):
    page = Page(page_of(folder, "qa", "drawn"))
    assert page.open == []
    overview = page.tables["Records, lengths, and what is answered right without looking"]
    tokenizer = load_tokenizer(folder / "tokenizer")
    answers = [len(tokenizer.encode(" red" if n % 4 else " blue")) for n in range(40)]
    tokens = 4 + 2 + len(tokenizer.encode("What color?")) + np.mean(answers) + 1
    assert overview[1][:7] == ["qa", "40", "1", "7", "40", f"{tokens:,.1f}", "16.0"]
    assert overview[1][8].startswith("75.0% ±") and overview[1][9] == "CC0 <b>"
    assert overview[2][:2] == ["drawn", "31"] and overview[2][8] == "–"
    (dropped,) = [rows for caption, rows in page.tables.items() if caption == "Dropped in the preparation"]
    assert dropped[1][:2] == ["no_answer", "7"] and "raw[0]" in dropped[1][2]
    questions = page.tables["Questions, most frequent first (1 different ones)"]
    assert questions[1] == ["What color?", "40", "2", "red", "75.0%", "75.0%"]
    assert "Of 31 training records (image 31), 1 have the content of another." in page.text
    assert "Their 31 pictures are 30 different files" in page.text
    assert "Of 40 training records (vqa 40), 0 have the content of another." in page.text
    assert "Of 1 different validation pictures 1 are also in training." in page.text


def test_what_sources_share(folder):
    page = Page(page_of(folder, "qa", "drawn"))
    words = page.tables["Different words that both sources have, of those that either has"]
    assert words[1:] == [["qa", "100.0%", "0.0%"], ["drawn", "0.0%", "100.0%"]]
    pictures = page.tables["Different pictures of a source (row) that the other (column) has too"]
    assert pictures[1:] == [["qa", "100.0%", "0.0%"], ["drawn", "0.0%", "100.0%"]]


def test_what_a_sample_finds_of_shared_pictures_is_scaled_up(folder):
    """All pictures are shared; of twenty, some ten are among the twenty that were looked at of the other source."""
    page = Page(page_of(folder, "qa", "twin", sample=20))
    rows = page.tables["Different pictures of a source (row) that the other (column) has too"]
    assert float(rows[1][2].rstrip("%")) > 70 and rows[1][1] == "100.0%"


def test_bars_of_lengths():
    """Forty-eight lengths in twenty-four bars; the one far away shares the last."""
    chart = _length_chart("Lengths", {**dict.fromkeys(range(100, 148), 10), 5000: 1})
    bars = re.findall(r"<title>([^:<]+): ([\d,]+)</title>", chart)
    assert bars == [*((f"{start}–{start + 1}", "20") for start in range(100, 146, 2)), ("146 or more", "21")]
    assert "median 124, 98% in 100–147, largest 5,000" in chart
    assert re.findall(r"<title>([^<]+)</title>", _length_chart("Lengths", {7: 3})) == ["7: 3"]
    assert _length_chart("Lengths", {}) == ""


def test_nothing_of_the_data_becomes_markup(folder):
    text = page_of(folder, "odd", "qa")
    page = Page(text)
    assert "script" not in page.tags and page.open == []
    assert not [a for a in page.attributes if a[1].startswith("on")]
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert sources and all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert ATTACK.replace("\x00", "\ufffd").split("\x00")[0][:40] in page.text, "but it is shown"
    assert escaped("<a b='\"'>&\ud800") == "&lt;a b=&#x27;&quot;&#x27;&gt;&amp;\\ud800"


def test_pictures_are_those_that_the_model_sees(folder):
    encode = load_tokenizer(folder / "tokenizer").encode
    stored = list(read_stored(folder / "drawn", "train"))
    shown = [report.show_sample(s, encode, SPEC) for s in stored[:3]]
    for sample, s in zip(shown, stored, strict=False):
        text, image = sample.parts
        assert text == ShownText(s.record.segments[0].text, True, 0)
        assert isinstance(image, ShownPicture) and image.size == (60, 20)
        expected = Image.open(io.BytesIO(s.record.segments[1].data)).resize((16, 48), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image.pixels, np.asarray(expected))
        assert sample.num_patches == 12
    page = page_of(folder, "drawn", shown=3)
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)"', page)
    for (data, width, height), sample in zip(encoded, shown, strict=True):
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), sample.parts[1].pixels
        )
        assert (int(width), int(height)) == (32, 96)


def test_supervised_text_is_marked(folder):
    marked = re.findall(r"<mark>(.*?)</mark>", page_of(folder, "qa", shown=40))
    answers = [text for text in marked if text != "Marked text"]
    assert sorted(answers) == sorted('<span class="spoken">(supervised) </span>' + ("red" if n % 4 else "blue")
                                     for n in range(40))  # fmt: skip


def test_a_picture_that_cannot_be_shown_is_said_so():
    damaged = Record("drawn", "image", (ImageSegment(b"nothing", 4, 4),))
    shown = report.show_sample(Stored(0, damaged, b"", "place"), lambda text: [], SPEC)
    assert shown.parts[0].pixels is None and shown.parts[0].fault.startswith("not_an_image")


def test_pictures_are_counted_without_decoding():
    records = [drawn(1), drawn(1), drawn(2), asked(1, "red"), Record("s", "x", (ImageSegment(b"no image", 300, 100),))]
    pictures = report.measure_pictures(records, SPEC)
    assert pictures.shapes == {(60, 20): 3, (40, 40): 1, (300, 100): 1}
    assert (pictures.count, len(pictures.digests)) == (5, 4)
    assert pictures.num_enlarged == 0, "20 x 60 becomes 16 x 48, 40 x 40 becomes 32 x 32"
    assert report.measure_pictures(records, ImageSpec(8, 64, 64)).num_enlarged == 4


def test_a_row_is_drawn_as_it_is_packed(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    candidates = [(name, s) for name in ("qa", "drawn") for s in read_stored(folder / name, "train", 6)]
    row = report.draw_row(candidates, tokenizer, SPEC, 64, 48)
    assert {source for source, _ in row.samples} == {"qa", "drawn"}
    assert [span.start for span in row.spans] == list(np.cumsum([0, *(span.length for span in row.spans)])[:-1])
    assert sum(span.length for span in row.spans) == 64
    places = {s.where + source: s.record for source, s in candidates}
    for number, (source, where) in enumerate(row.samples, start=1):
        record = places[where + source]
        is_drawn = source == "drawn"
        visual = row.count("visual_supervised" if is_drawn else "visual", sample=number)
        assert visual == (3 if is_drawn else 4)
        answer = next(s for s in record.segments if isinstance(s, TextSegment) and s.loss)
        # Of a caption its first token is no target, but the two markers of the picture are; each ends with <eos>.
        extra = 2 if is_drawn else 1
        assert row.count("supervised", sample=number) == len(tokenizer.encode(answer.text)) + extra
    assert row.used_patches == sum(12 if source == "drawn" else 16 for source, _ in row.samples)
    assert report.draw_row(candidates, tokenizer, SPEC, 4, 4) is None
    texts = ["picture number " * 8, *(f"number {n}" for n in range(4))]
    stored = [Stored(0, Record("text", "text", (TextSegment(text, True),)), b"", text) for text in texts]
    length = len(tokenizer.encode(texts[0])) + 1
    full = report.draw_row([("text", s) for s in stored], tokenizer, SPEC, length, 4)
    assert len(full.samples) > 1 and texts[0] not in [where for _, where in full.samples], "the row of most samples"
    page = Page(page_of(folder, "qa", "drawn", row_tokens=64, row_patches=48))
    assert len(page.tables["Samples of the row"]) == len(row.samples) + 1
    values = [(name, value) for _, name, value in page.attributes]
    targets = {value[1:] for name, value in values if name == "href"}
    assert targets == {value for name, value in values if name == "id"} and "row" in targets


def test_spans_of_a_row_by_hand():
    row = {
        "segment_ids": [1, 1, 1, 2, 2, 0, 0], "visual_mask": [0, 1, 1, 0, 0, 0, 0],
        "visual_loss_mask": [0, 0, 1, 0, 0, 0, 0], "text_loss_mask": [0, 0, 0, 0, 1, 0, 0],
    }  # fmt: skip
    spans = report.spans_of(
        {name: np.array(values, int if name == "segment_ids" else bool) for name, values in row.items()}
    )
    assert spans == [
        Span("context", 0, 1, 1), Span("visual", 1, 1, 1), Span("visual_supervised", 2, 1, 1), Span("context", 3, 1, 2),
        Span("supervised", 4, 1, 2), Span("padding", 5, 2, 0),
    ]  # fmt: skip
    assert DrawnRow(tuple(spans), (), 0, 0).count("context", "supervised", sample=2) == 2


def test_the_same_folders_give_the_same_page(folder):
    first = page_of(folder, "qa", "drawn", row_tokens=64, row_patches=48)
    assert page_of(folder, "qa", "drawn", row_tokens=64, row_patches=48) == first


def test_a_sample_is_said_to_be_one(folder):
    page = Page(page_of(folder, "qa", sample=10))
    assert "Copies outside the sample are not counted." in page.text
    assert page.tables["Records, lengths, and what is answered right without looking"][1][4] == "10"


def test_refusals_name_what_to_do(folder, capsys):
    def refused(*names, **changes):
        assert run(folder, *names, **changes) == 2
        return capsys.readouterr().err

    assert "no readable manifest.json" in refused("nowhere")
    assert "no readable index of lengths for this tokenizer, --patch-size" in refused("qa", max_patches=64)
    assert "give both" in refused("qa", row_tokens=64)
    assert "tokenizer.json does not exist" in refused("qa", tokenizer=folder / "none")
    assert "--sample -1" in refused("qa", sample=-1)
    (folder / "file").write_text("")
    assert "--output" in refused("qa", output=folder / "file" / "page.html")


def test_a_folder_without_training_records_has_a_page(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_prepared([], tmp_path / "empty", source="empty", tokenizer=tokenizer, spec=SPEC, licence="CC0",
                   val_samples=[asked(1, "red")])  # fmt: skip
    made = report.report_source(tmp_path / "empty", "empty", tokenizer, SPEC, sample=0, num_shown=2, row_size=(64, 16))
    assert made.num_too_long == 0 and made.bias == measure_bias([])
    assert Page(render_page([made], {}, None)).open == []
