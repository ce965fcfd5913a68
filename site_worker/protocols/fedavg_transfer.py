"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: federated fine-tuning of a model trained elsewhere."""

from __future__ import annotations

from nightsplit.site_worker.rounds.role import RoundSite

ROLE = RoundSite
