"""The hospital changes its mind while a worker runs: the next message is held, and nothing is lost."""

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from tests.harness.workers import POLICY, Hospital


@pytest.mark.timeout(300)
def test_a_stricter_policy_holds_the_next_message_of_a_worker_that_runs(tmp_path):
    # One site: of several in strict order, one that waits for the others has no next message to hold.
    hospital = Hospital(tmp_path / "lipids", epochs=12, sites=("north",))
    calm = Hospital(tmp_path / "calm", epochs=12, sites=("north",))
    policy = hospital.folder / "policy.toml"
    try:
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_steps(30, seconds=120)
        policy.write_text('allowed = ["activations", "counts"]\n')
        assert hospital.processes.pop("north").wait(60) == 1
        log = (hospital.folder / "north.log").read_text()
        assert "E108 Policy forbids what the run asks: policy.toml: lipids/" in log
        assert 'needs "labels" in allowed' in log
        assert "It was not sent." in log
        left = waiting(hospital)
        held = hospital.call("site", "north.toml")  # nor does it begin
        assert (held.returncode, held.stderr.count("E108")) == (1, 1)
        assert waiting(hospital) <= left
        policy.write_text(POLICY)
        hospital.start("north")
        hospital.wait_for_end(200)
    finally:
        hospital.close()
    assert hospital.models() == calm.in_peace()


def waiting(hospital: Hospital) -> int:
    """Messages of the site that the server has not taken yet."""
    broker = EmbeddedBroker(hospital.folder / "broker", 2**24)
    return broker.depth(site_queues("lipids", "north", 2**32).up) or 0
