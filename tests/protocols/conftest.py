"""What holds for every test of a system in one process."""

import pytest

from tests.harness.night import Night
from tests.harness.ward import Ward


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """No host dies here, so nothing has to be forced to disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Runs that nobody disturbs, each trained once: of a configuration, or of one and the sites that go."""
    known = {}

    def run(config, goes=None):
        which = config.canonical(), str(goes)
        if which not in known:
            folder = tmp_path_factory.mktemp("calm")
            known[which] = (Night(config, folder) if goes is None else Ward(config, folder, goes)).run()
        return known[which]

    return run
