"""fedavg_dp_seg (Ziller et al., arXiv 2107.02586): the site adds noise to its training, and keeps an account of it."""

from nightsplit.site_worker.protocols.fedavg_transfer import FedavgTransferSite


class FedavgDpSegSite(FedavgTransferSite):
    """The same half, with the trainer, the batches and the account of a `PrivateSplit`."""


ROLE = FedavgDpSegSite
