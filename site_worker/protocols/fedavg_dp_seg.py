"""fedavg_dp_seg (Ziller et al., arXiv 2107.02586): the site trains with noise, and records the privacy it spends."""

from nightsplit.site_worker.protocols.fedavg_transfer import FedavgTransferSite


class FedavgDpSegSite(FedavgTransferSite):
    """The role of fedavg_transfer, with the trainer, batches and account of `PrivateTraining`."""


ROLE = FedavgDpSegSite
