"""The contracts of the systems: payloads, settings, paper. Each has a half at the site and one at the server.

`PROTOCOLS` is the whole list; a test checks that every entry has both halves.
"""

from __future__ import annotations

PROTOCOLS: dict[str, str] = {
    "split_labels": "Ha et al., IEEE Access 2021: activations and labels go to the server, gradients return",
    "split_u": "U-shaped: the last layers and the labels stay at the site",
    "split_frozen": "Ha et al., detached in time: activations are released once, the server trains on its store",
    "fedavg_transfer": "Zhang and Li, arXiv 2203.12803: what sites' training changed is averaged, round by round",
    "fedavg_dp_seg": "Ziller et al., arXiv 2107.02586: likewise, with differential privacy at the site",
    "data_vectors": "Tian et al., arXiv 2408.13038: each site trains alone, once; what changed is added up",
}

QUERIES: dict[str, str] = {
    "he_clstm": "Yue et al., ACM TOIT 2021: sequences are judged while they are encrypted",
}
"""Systems that ask the model of a finished run; no run trains with them."""

ROUNDS = ("fedavg_transfer", "fedavg_dp_seg", "data_vectors")
"""Systems whose participants exchange weights of the whole model; in the others a model is cut."""
