"""The host of all workers, embedded broker and SQLite loses power again and again; the run ends as if it had not."""

import pytest

from tests.faults.chaos import Campaign, carry_out, passed
from tests.harness.processes import Process


@pytest.mark.usefixtures("power_cuts")
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("protocol", ["split_labels", "fedavg_dp_seg"])
def test_a_run_survives_power_cuts(protocol, tmp_path):
    result = carry_out(Campaign(kills=0, power_cuts=10, seed=8, gap=40, protocol=protocol, begin=Process), tmp_path)
    assert result["power_cuts"] == 10, result
    assert passed(result), result
