"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: federated fine-tuning of a pretrained model."""

from nightsplit.site_worker.rounds.role import RoundSite


class FedavgTransferSite(RoundSite):
    """Role that fine-tunes the server's last model on the site's patients, and sends the update."""


ROLE = FedavgTransferSite
