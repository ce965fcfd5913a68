"""The site halves of the systems."""

from __future__ import annotations

from shared.config import RunConfig
from shared.protocols.assembly import assemble
from site_worker.bottom import Bottom
from site_worker.data.dataset import Parts
from site_worker.feed import Feed
from site_worker.protocols.split_frozen import SplitFrozenSite
from site_worker.protocols.split_labels import SplitLabelsSite
from site_worker.protocols.split_u import SplitUSite
from site_worker.protocols.stream import StreamSite

WITHOUT_HEAD = {"split_labels": SplitLabelsSite, "split_frozen": SplitFrozenSite}


def make_site(name: str, config: RunConfig, parts: Parts, incarnation: str, device: str = "cpu") -> StreamSite:
    """The role of a site in a run.

    Args:
        name: the site.
        config: the run.
        parts: the site's scaled data.
        incarnation: names this process.
        device: where the site's layers compute.

    Raises:
        ConfigError: 104, 105 the model cannot be used.
    """
    assembly = assemble(config)
    bottom = Bottom(assembly.halves.bottom, config.optimizer, device)
    feed = Feed(config, name, parts)
    if assembly.halves.head is not None:
        return SplitUSite(name, config, bottom, feed, assembly.contract, incarnation, assembly.halves.head, device)
    return WITHOUT_HEAD[config.run.protocol](name, config, bottom, feed, assembly.contract, incarnation)
