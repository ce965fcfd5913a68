"""he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM): classification of encrypted sequences.

A protocol of the Query shape for a finished run whose model ends in a `SequenceClassifier`. Its gates decide the
course of a query:

    refresh    gates see h: one message each way for every frame. Between two frames h, c and the votes return
               blinded to the site, which encrypts them again: 3 levels are enough for any length.
    one_shot   gates see x_t alone: one message each way, for a site that is offline until the next day.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError, RunError
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.models.factory import make
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.protocols import query
from nightsplit.shared.protocols.spec import Names, ProtocolSpec, Shape


def stages_of(config: RunConfig, base: Path) -> tuple[nn.Sequential, nn.Sequential]:
    """Build both parts of a run's model, without trained weights: the site's stages, and the classifier.

    `base` is the folder of run.toml.

    Raises:
        ConfigError: 101, 103, 104, 119 the model cannot be built, 105 its last stage cannot work on ciphertexts.
    """
    whole = make(config.model, config.run.seed, base)
    stages = list(whole.named_children()) if isinstance(whole, nn.Sequential) else []
    if len(stages) < 2 or not isinstance(stages[-1][1], SequenceClassifier):
        sentence = f"model.factory {config.model.factory}: its last stage cannot work on ciphertexts."
        remedy = "train a model that ends with a SequenceClassifier, as nightsplit.models:clstm does."
        raise ConfigError(105, sentence, remedy)
    return nn.Sequential(OrderedDict(stages[:-1])), nn.Sequential(OrderedDict(stages[-1:]))


def classifier_of(last: nn.Sequential) -> ClassifierWeights:
    """Return the present weights of the classifier in its part."""
    (classifier,) = last.children()
    return ClassifierWeights.of(classifier.state_dict())


def load_trained(part: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Load the trained weights of a part from the first existing file of `names` in the folder of a finished run.

    Raises:
        RunError: 605 no such file exists, 604 it lacks the weights or has different ones.
    """
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise RunError(605, f"{folder} has no trained model: the run has not finished here.", "finish the run first.")
    try:
        with safe_open(path, framework="pt") as file:
            part.load_state_dict({name: file.get_tensor(name) for name in part.state_dict()})
    except (OSError, SafetensorError, RuntimeError) as error:
        sentence = f"{path}: {str(error).splitlines()[0]}."
        raise RunError(604, sentence, "name the file that the finished run has written.") from None


SPEC = ProtocolSpec(
    name="he_clstm",
    paper="Yue et al., ACM TOIT 21(3):57, HE-CLSTM",
    shape=Shape.QUERY,
    payloads=lambda config, shapes: query.CONTRACT,
    names=Names(
        weights="model", share="the queried model", heading="encrypted", steps="queries",
        message="query", fate="answered", done="answered", reply="answer",
    ),
)  # fmt: skip
