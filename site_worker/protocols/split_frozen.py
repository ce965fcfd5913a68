"""split_frozen: Ha et al. (IEEE Access 2021) with a bottom that is not trained.

The bottom keeps its initial weights. The site uploads its activations once and may then disconnect: the only answer
is the farewell at the end of the run.
"""

from nightsplit.site_worker.protocols.split_labels import SplitLabelsSite


class SplitFrozenSite(SplitLabelsSite):
    """The role of split_labels, for a plan with one epoch and an unlimited window."""


ROLE = SplitFrozenSite
