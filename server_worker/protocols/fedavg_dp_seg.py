"""fedavg_dp_seg (Ziller et al., arXiv 2107.02586): the noise is in the updates before they come."""

from nightsplit.server_worker.protocols.fedavg_transfer import FedavgTransferServer


class FedavgDpSegServer(FedavgTransferServer):
    """Averages noisy updates like any others."""


ROLE = FedavgDpSegServer
