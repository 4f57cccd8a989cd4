"""Fixtures of all tests: the engine processes, the checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.engine.host import RUNNERS, Host

# How long an example takes says what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

DEMO_MODEL = Path(__file__).parent.parent / "scripts" / "demo_model"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, which have a limit of their own: else one process is left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(scope="session", params=RUNNERS)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Engines of one of vLLM's two model runners."""
    host = Host(request.param)
    yield host
    host.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that random checkpoints are made in."""
    return tmp_path_factory.mktemp("checkpoints")
