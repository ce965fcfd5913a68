"""A table of a TOML file, and the types of its values."""

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class KeyConflict(ValueError):
    """A key that does not go with others of its table, or of the file.

    Args:
        key: its place below the table that is checked, e.g. "quorum" of [run], "data.features" of the whole file.
        what: what is wrong with it.
        remedy: what the user can do about it, as an instruction.
    """

    def __init__(self, key: str, what: str, remedy: str) -> None:
        super().__init__(f"{key}: {what}; {remedy}")
        self.key, self.what, self.remedy = key, what, remedy


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a TOML file: unknown keys are refused.

    What one key cannot tell alone is checked in `__post_init__`, which raises `KeyConflict`.
    """
