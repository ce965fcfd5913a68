"""Tables of TOML files, and the types of their values."""

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}\Z")]

PublicKeyText = Annotated[str, Meta(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]


class KeyConflictError(ValueError):
    """Conflict between a key and others of its table, or of the file.

    Args:
        key: path of the key below the checked table, e.g. "quorum" of [run], "data.features" of the whole file.
        sentence: description of the conflict.
        remedy: instruction to the user that resolves it.
    """

    def __init__(self, key: str, sentence: str, remedy: str) -> None:
        super().__init__(f"{key}: {sentence}; {remedy}")
        self.key, self.sentence, self.remedy = key, sentence, remedy


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """Table of a TOML file: unknown keys are refused.

    Rules between keys are checked in `__post_init__`, which raises `KeyConflictError`.
    """
