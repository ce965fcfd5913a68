"""fedavg_transfer: the sites' updates of a published model are averaged, round by round."""

from nightsplit.shared.protocols import rounds

PAPER = "Zhang and Li, arXiv 2203.12803, stage 2"
SPEC = rounds.protocol(name="fedavg_transfer", paper=PAPER, payloads=rounds.payloads, check=rounds.check)
