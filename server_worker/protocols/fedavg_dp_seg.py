"""fedavg_dp_seg (Ziller et al., arXiv 2107.02586): sites add the noise to their updates."""

from nightsplit.server_worker.protocols.fedavg_transfer import FedavgTransferServer


class FedavgDpSegServer(FedavgTransferServer):
    """Server role of fedavg_dp_seg, which averages noisy updates like any others."""


ROLE = FedavgDpSegServer
