"""split_frozen: Ha et al. (IEEE Access 2021) with the site's layer detached in time.

The bottom keeps its first weights. Its activations are released once; after that the site is free
to go. Nothing comes back but the news that the run has finished.
"""

from nightsplit.site_worker.protocols.split_labels import SplitLabelsSite


class SplitFrozenSite(SplitLabelsSite):
    """Sends like split_labels; the plan has one epoch, and a window that never closes."""


ROLE = SplitFrozenSite
