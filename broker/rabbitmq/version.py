"""Versions of RabbitMQ that nightsplit cannot use."""

import re
from collections.abc import Mapping
from typing import Any

from nightsplit.shared.errors import BrokerError

UNUSABLE: dict[tuple[int, ...], str] = {(4, 2, 6): "4.2.7", (4, 3, 0): "4.3.1"}
"""Versions in which a site would need the right to delete a queue in order to see it, and the next ones, which are
repaired."""


def read_version(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (4, 3, 1) for '4.3.1', '4.3.1-rc.2' or '4.3.1+5'."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split("[-+]", version)[0]))


def version_refused(properties: Mapping[str, Any], host: str) -> BrokerError | None:
    """Return the error for a server that cannot be used, by the properties in its greeting; None for any other."""
    repaired = UNUSABLE.get(read_version(str(properties.get("version", ""))))
    if properties.get("product") != "RabbitMQ" or repaired is None:
        return None
    sentence = f"{host} runs RabbitMQ {properties['version']}, where sites cannot see their own queues."
    return BrokerError(213, sentence, f"upgrade it to RabbitMQ {repaired} or newer.")
