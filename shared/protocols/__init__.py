"""The contracts of the systems: payloads, settings, paper. Each has a half at the site and one at the server.

`PROTOCOLS` is the whole list; a test checks that every entry has both halves.
"""

from __future__ import annotations

PROTOCOLS: dict[str, str] = {
    "split_labels": "Ha et al., IEEE Access 2021: activations and labels go to the server, gradients return",
    "split_u": "U-shaped: the last layers and the labels stay at the site",
    "split_frozen": "Ha et al., detached in time: activations are released once, the server trains on its store",
}
