"""A tiny model of every family with a call, a whole pipeline, and the warnings of diffsparse."""

import logging

import pytest
from tiny_models import TINY, tiny_wan_pipeline


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


@pytest.fixture
def model(tiny):
    return tiny.make()


@pytest.fixture
def call(tiny, model):
    return tiny.call(model, tiny.grid, batch=2)


@pytest.fixture
def pipeline():
    return tiny_wan_pipeline()


@pytest.fixture
def warnings(caplog):
    """What diffsparse warns of."""
    caplog.set_level(logging.WARNING, logger="diffsparse")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("diffsparse")]
