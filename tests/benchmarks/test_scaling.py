"""The model on paper stays near what was published, and its parts are what they are said to be."""

import math

import pytest

from benchmarks import scaling


def test_it_is_near_the_published_figures():
    published = {key: value for key, value in scaling.PUBLISHED.items() if key[:2] == ("llama-8b", "fast")}
    for way, figures in published.items():
        for tokens, thousands in figures.items():
            assert scaling.tokens_a_second(*way, 64, tokens) == pytest.approx(1e3 * thousands, rel=0.2)
    assert scaling.speedup() == pytest.approx(scaling.PUBLISHED_SPEEDUP, rel=0.05)


def test_a_gather_is_as_slow_as_its_slowest_part():
    size, reached = 8e9, scaling.BANDWIDTH
    assert scaling.gather_seconds(size, 1) == 0
    assert scaling.gather_seconds(size, 8) == pytest.approx(size * 7 / 8 / (scaling.NVLINK * reached))
    ports = scaling.NODE * scaling.PORT * reached
    assert scaling.gather_seconds(size, 1024) == pytest.approx(size * 127 / 128 / ports)


def test_every_number_of_the_model_is_among_its_assumptions():
    names = {row[0].strip("`") for row in scaling.assumptions()}
    assert names >= {"PEAK", "MEMORY", "NODE", "NVLINK", "PORT", "PRODUCTS", "BANDWIDTH", "OVERLAP", "LATENCY"}
    step = scaling.Step(tokens=3.0, fixed=1.0, sent=2.0)
    assert math.isclose(step.seconds, 4 + (1 - scaling.OVERLAP) * 2)
