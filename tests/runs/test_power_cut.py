"""The host of all workers, embedded broker and SQLite loses power again and again; the run ends as if it had not."""

import pytest

from tests.faults.chaos import Campaign, carry_out, passed
from tests.harness.processes import Process


@pytest.mark.usefixtures("power_cuts")
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("protocol", "cuts"), [("split_labels", 6), ("fedavg_dp_seg", 4)])
def test_a_run_survives_power_cuts(protocol, cuts, tmp_path):
    result = carry_out(Campaign(kills=0, power_cuts=cuts, seed=8, gap=40, protocol=protocol, begin=Process), tmp_path)
    assert result["power_cuts"] == cuts, result
    assert passed(result), result
