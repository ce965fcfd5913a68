"""he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM): sequences are judged while they are encrypted.

A system of the Query shape. It asks a model that is there: the one of a finished run whose last stage is a
`SequenceClassifier`. Whether its gates see the state decides how a query goes:

    refresh    gates see h: one message each way for every frame. Between two frames h, c and the votes come
               back to the site, blinded, which encrypts them afresh: 3 levels are enough for any length.
    one_shot   gates see x_t alone: one message each way, made for a site that is offline until tomorrow.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError, RunError
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.models.partition import make
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.protocols import query
from nightsplit.shared.protocols.spec import Names, ProtocolSpec, Shape


def stages_of(config: RunConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Both parts of a run's model, as it is made: what works at the site, and the classifier alone.

    Raises:
        ConfigError: 104 the model cannot be made, 105 its last stage cannot work on ciphertexts.
    """
    whole = make(config.model, config.run.seed)
    stages = list(whole.named_children()) if isinstance(whole, nn.Sequential) else []
    if len(stages) < 2 or not isinstance(stages[-1][1], SequenceClassifier):
        what = f"model.factory {config.model.factory}: its last stage works on no ciphertexts."
        raise ConfigError(
            105, what, "train a model that ends with a SequenceClassifier, as nightsplit.models:clstm does."
        )
    return nn.Sequential(OrderedDict(stages[:-1])), nn.Sequential(OrderedDict(stages[-1:]))


def classifier_of(last: nn.Sequential) -> ClassifierWeights:
    """The classifier in its part, with the weights that it has there."""
    (classifier,) = last.children()
    return ClassifierWeights.of(classifier.state_dict())


def fill(part: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Load the trained weights of a part.

    Args:
        part: of the run's model.
        folder: where the finished run has written its model.
        names: of files that hold the part's weights, perhaps among others; the first that is there is read.

    Raises:
        RunError: 605 there is none, 604 the weights are not in it, or are others.
    """
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        what = f"{folder} has no trained model: the run has not finished here."
        raise RunError(605, what, "let the run finish first.")
    try:
        with safe_open(path, framework="pt") as file:
            part.load_state_dict({name: file.get_tensor(name) for name in part.state_dict()})
    except (OSError, SafetensorError, RuntimeError) as error:
        what = f"{path}: {str(error).splitlines()[0]}."
        raise RunError(604, what, "name the file that the finished run has written.") from None


SPEC = ProtocolSpec(
    name="he_clstm",
    paper="Yue et al., ACM TOIT 21(3):57, HE-CLSTM",
    shape=Shape.QUERY,
    payloads=lambda config, shapes: query.CONTRACT,
    names=Names(
        weights="model",
        share="the model that is asked",
        heading="encrypted",
        steps="queries",
        message="query",
        fate="answered",
        done="answered",
        reply="answer",
    ),
)
