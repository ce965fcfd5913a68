"""The hospital changes its mind while a worker runs: the next message is held, and nothing is lost."""

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from tests.harness.workers import POLICY, Hospital


@pytest.mark.timeout(300)
def test_a_stricter_policy_holds_the_next_message_of_a_worker_that_runs(tmp_path):
    hospital, calm = Hospital(tmp_path / "lipids", epochs=12), Hospital(tmp_path / "calm", epochs=12)
    policy = hospital.folder / "policy.toml"
    try:
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_steps(30, seconds=120)
        policy.write_text('allowed = ["activations", "counts"]\n')
        for site in ("north", "south", "east"):
            assert hospital.processes.pop(site).wait(60) == 1
            log = (hospital.folder / f"{site}.log").read_text()
            assert "E108 Policy forbids what the run asks: policy.toml: lipids/" in log
            assert 'needs "labels" in allowed' in log
            assert "It was not sent." in log
        left = sent(hospital)
        for site in ("north", "south", "east"):
            held = hospital.call("site", f"{site}.toml")  # nor does it begin
            assert (held.returncode, held.stderr.count("E108")) == (1, 1)
        assert sent(hospital) <= left
        policy.write_text(POLICY)
        for site in ("north", "south", "east"):
            hospital.start(site)
        hospital.wait_for_end(200)
    finally:
        hospital.close()
    assert hospital.models() == calm.in_peace()


def sent(hospital: Hospital) -> int:
    """Messages of all sites that the server has not taken yet."""
    broker = EmbeddedBroker(hospital.folder / "broker", 2**24)
    return sum(broker.depth(site_queues("lipids", site, 2**32).up) or 0 for site in ("north", "south", "east"))
