"""One model, a server that many tests ask, and an engine for servers of a test's own."""

import dataclasses
import time

import pytest

from support import serving


@pytest.fixture(scope="session")
def pretrained():
    return serving.model()


@pytest.fixture(scope="session")
def shared(pretrained):
    """A server that none of the tests stops."""
    with serving.running(serving.engine_of(pretrained), serving.served(pretrained)) as running:
        yield running


@pytest.fixture(scope="session")
def session_engine(pretrained):
    return serving.engine_of(pretrained)


@pytest.fixture
def engine(session_engine):
    """An engine without work, for a server of the test's own; its limits may be changed."""
    limits = session_engine.limits
    yield session_engine
    session_engine.limits = limits
    while session_engine.has_work:
        session_engine.step()


@pytest.fixture
def short_queue(engine):
    """The same with a queue of one."""
    engine.limits = dataclasses.replace(engine.limits, max_queue=1)
    return engine


@pytest.fixture
def slow(pretrained, engine, monkeypatch):
    """A server whose every step takes a while, so that clients can leave during one."""
    step, steps = engine.step, []

    def slow_step():
        time.sleep(0.1)
        steps.append(engine.stats().generated_tokens)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    with serving.running(engine, serving.served(pretrained)) as running:
        running.steps = steps
        yield running
