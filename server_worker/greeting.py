"""Hellos of a site: their content, and bounds on the answers to them."""

from typing import NamedTuple

INCARNATIONS_MAX = 8
"""Largest number of incarnations of a site that are remembered."""
HELLO_ANSWERS_MAX = 1000
"""Hellos of a site that are answered with the manifest or a rejection, which wait for the site until it reads them."""
RECEIPTS_MAX = 1000
"""Receipts that a site gets, besides one for each message of it that is applied; they wait for it likewise."""
REPEATS_MAX = 1000
"""Messages that are sent to a site again, besides one for each message of it that is applied."""
INCARNATION_LENGTH_MAX = 64
"""Largest number of characters in an incarnation's name."""


class Samples(NamedTuple):
    """Numbers of a site's samples in each part."""

    train: int
    validation: int
    test: int


class LogHead(NamedTuple):
    """Number of lines of a site's exit log, and the head of its chain."""

    lines: int = 0
    head: str = ""
