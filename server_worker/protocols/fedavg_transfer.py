"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: averaging (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

import torch

from server_worker.protocols.round import RoundServer


class FedavgTransferServer(RoundServer):
    """The next model is the last one plus the combined update."""

    def combined(self) -> torch.Tensor:
        """See `RoundServer`; a slice that nobody reported stays as it was."""
        vector = self.vector.clone()
        for number in range(1, self.layout.slices + 1):
            change = self.aggregation.result(number)
            if change is not None:
                vector[self.layout.slice(number)] += change
        return vector
