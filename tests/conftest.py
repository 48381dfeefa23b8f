"""What several test modules share."""

from collections.abc import Iterator

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that runs the scripts in forks of itself, started once."""
    server = Forks()
    yield server
    server.close()
