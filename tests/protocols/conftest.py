"""What holds for every test of a system in one process."""

import pytest


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """No host dies here, so nothing has to be forced to disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
