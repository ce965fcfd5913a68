"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: federated fine-tuning of a model trained elsewhere."""

from nightsplit.site_worker.rounds.role import RoundSite


class FedavgTransferSite(RoundSite):
    """Trains on its patients from the model that came last; what changed goes to the server."""


ROLE = FedavgTransferSite
