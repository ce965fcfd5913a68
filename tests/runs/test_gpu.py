"""The same run where a CUDA device is present. Everything else passes without one."""

import pytest
import torch

from nightsplit.shared.protocols.spec import Shape, systems
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(
    ("protocol", "bottoms"),
    [
        ("split_labels", "independent"),
        ("split_labels", "averaged"),
        ("split_u", "averaged"),
        ("split_frozen", "independent"),
        ("fedavg_transfer", "independent"),
        ("data_vectors", "independent"),
    ],
)
def test_a_run_on_the_gpu_survives_crashes_bit_identical(protocol, bottoms, tmp_path):
    config = tiny_config(protocol=protocol, bottoms=bottoms, average_every=4, epochs=2)
    calm = Night(config, tmp_path / "calm", device="cuda").run()
    on_device = calm.roles["north"].trainer if protocol in systems(Shape.ROUND) else calm.roles[SERVER].top
    assert next(on_device.module.parameters()).is_cuda
    shaken = Night(config, tmp_path / "shaken", prefetch=16, device="cuda").shaken(seed=1)
    assert shaken.fingerprint() == calm.fingerprint()


def test_gpu_and_cpu_agree_without_dropout(tmp_path):
    config = tiny_config(dropout=0.0, codec="fp32", epochs=1)
    nights = [Night(config, tmp_path / device, device=device).run() for device in ("cpu", "cuda")]
    cpu, gpu = (night.roles[SERVER].top.module.state_dict() for night in nights)
    for name, tensor in cpu.items():
        torch.testing.assert_close(tensor, gpu[name].cpu(), rtol=1e-3, atol=1e-4)
