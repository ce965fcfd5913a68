"""Suggestions for unknown keys and values in a user's file."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from msgspec import inspect


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean strict?)", or an empty string if no known word resembles this one."""
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def words_of(kind: inspect.Type) -> Iterator[str]:
    """Yield every key of a file, and every word that is a valid value of one."""
    match kind:
        case inspect.StructType(fields=fields):
            for field in fields:
                yield field.encode_name
                yield from words_of(field.type)
        case inspect.UnionType(types=types):
            for type_ in types:
                yield from words_of(type_)
        case inspect.ListType(item_type=item):
            yield from words_of(item)
        case inspect.EnumType(cls=words) | inspect.LiteralType(values=words):
            yield from map(str, words)
