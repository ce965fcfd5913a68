"""Versions of RabbitMQ: which cannot be used, and which need quorum queues."""

import re
from collections.abc import Mapping
from typing import Any

from nightsplit.shared.errors import BrokerError

UNUSABLE: dict[tuple[int, ...], str] = {(4, 2, 6): "4.2.7", (4, 3, 0): "4.3.1"}
"""Versions in which a site would need the right to delete a queue in order to see it, and the next ones, which are
repaired."""


FIRST_UNSYNCED = (3, 13)
"""First version whose classic queues confirm a message before it is forced to disk: its release notes say so, and every
message was lost after a power cut of 4.0.5 and of 4.3.6, none of 3.10.8. Quorum queues sync their log first."""


def read_version(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (4, 3, 1) for '4.3.1', '4.3.1-rc.2' or '4.3.1+5'."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split("[-+]", version)[0]))


def needs_quorum_queues(properties: Mapping[str, Any]) -> bool:
    """Return whether classic queues of this server lose confirmed messages when its host loses power."""
    version = read_version(str(properties.get("version", "")))
    return properties.get("product") == "RabbitMQ" and version >= FIRST_UNSYNCED


def version_refused(properties: Mapping[str, Any], host: str) -> BrokerError | None:
    """Return the error for a server that cannot be used, by the properties in its greeting; None for any other."""
    repaired = UNUSABLE.get(read_version(str(properties.get("version", ""))))
    if properties.get("product") != "RabbitMQ" or repaired is None:
        return None
    sentence = f"{host} runs RabbitMQ {properties['version']}, where sites cannot see their own queues."
    return BrokerError(213, sentence, f"upgrade it to RabbitMQ {repaired} or newer.")
