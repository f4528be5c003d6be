"""Imported models against what torch computed of them, from stored arrays; `make parity` does it live, with torch."""

import numpy as np
import pytest
from parity.checks import check_language, check_vision
from parity.golden import FOLDER, LANGUAGE_MODELS, VISION_ENCODERS


def expected_of(name):
    with np.load(FOLDER / name / "expected.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model(name):
    check_language(FOLDER / name, expected_of(name))


@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_vision_encoder(name):
    check_vision(FOLDER / name, expected_of(name))
