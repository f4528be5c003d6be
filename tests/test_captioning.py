"""Captions: words by hand; figures against pycocoevalcap's known ones where it is installed."""

import gzip
import importlib.util
import json
import math

import numpy as np
import pytest
from test_benchmarks import DATA

from unihetero_jax.evaluation.captioning import score_captions, tokenize
from unihetero_jax.evaluation.official import score_predictions

needs_scorers = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is an extra: pip install -e '.[captions]'"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, 2 cats.", "a man 's dog 2 cats"),
        ("It isn't a T-shirt!", "it is n't a t-shirt"),
        ("They're \u201cred\u201d \u2013 4.5 m", "they 're red 4.5 m"),
        ("don\u2019t", "do n't"),
        ("...", ""),
    ],
)
def test_words(text, expected):
    assert tokenize(text) == expected


@needs_scorers
def test_equal_captions_score_most_and_others_nothing():
    references = {"1": ["a red dog on a sofa", "the dog sits"], "2": ["two cats"], "3": ["a big green bus in town"]}
    found = score_captions(references, {index: texts[0] for index, texts in references.items()})
    assert found.figures["rouge_l"] == pytest.approx(1.0) and found.figures["bleu_4"] == pytest.approx(1.0, abs=1e-3)
    assert found.cider_by_picture["3"] == pytest.approx(10.0), "one reference, met to the word"
    found = score_captions(references, dict.fromkeys(references, "zebra"))
    assert found.figures["cider"] == found.figures["rouge_l"] == 0.0 and set(found.cider_by_picture.values()) == {0.0}
    assert set(found.errors.values()) == {0.0}


@needs_scorers
def test_errors_are_those_of_the_jackknife(capsys):
    """BLEU is no mean over pictures: each picture is left out once, and the public scorer scores the rest."""
    from pycocoevalcap.bleu.bleu import Bleu

    rng = np.random.default_rng(0)
    words = ["a", "red", "dog", "on", "the", "sofa", "big"]

    def text(length):
        return " ".join(rng.choice(words, length))

    references = {str(i): [text(8), text(6)] for i in range(150)}
    captions = {
        index: " ".join(one.split()[:5]) + " " + text(rng.integers(1, 3)) for index, (one, _) in references.items()
    }
    found = score_captions(references, captions)
    left_out = []
    for gone in references:
        rest = [index for index in references if index != gone]
        left_out.append(Bleu(4).compute_score({i: references[i] for i in rest}, {i: [captions[i]] for i in rest}, 0)[0])
    spread = np.sqrt(149 / 150 * ((np.array(left_out) - np.mean(left_out, axis=0)) ** 2).sum(axis=0))
    for n in range(4):
        assert found.errors[f"bleu_{n + 1}"] == pytest.approx(spread[n], rel=0.05) and spread[n] > 0.001
    by_picture = list(found.cider_by_picture.values())
    assert found.errors["cider"] == pytest.approx(np.std(by_picture) / math.sqrt(150))


@needs_scorers
@pytest.mark.skipif(not (DATA / "coco_captions").is_dir(), reason=f"no COCO captions at {DATA}")
def test_people_against_people(tmp_path):
    """The first caption of each picture against the rest: published figures of this set are .8884, .1960 and .4719."""
    document = json.loads(gzip.decompress((DATA / "coco_captions" / "captions_val2017_4970.json.gz").read_bytes()))
    captions = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    several = {index: texts for index, texts in captions.items() if len(texts) > 1}
    rest = [{"image_id": index, "caption": text} for index, texts in several.items() for text in texts[1:]]
    images = [{"id": index, "file_name": f"{index}.jpg"} for index in several]
    (tmp_path / "rest.json").write_text(json.dumps({"images": images, "annotations": rest}))
    first = [{"image_id": index, "caption": texts[0]} for index, texts in several.items()]
    (tmp_path / "first.json").write_text(json.dumps(first))
    result = score_predictions("captions", str(tmp_path / "rest.json"), str(tmp_path / "first.json"))
    assert result["num_items"] == len(several)
    assert result["overall"] == result["cider"] == pytest.approx(0.8884, abs=0.01)
    assert result["bleu_4"] == pytest.approx(0.1960, abs=0.004) and result["rouge_l"] == pytest.approx(
        0.4719, abs=0.004
    )
