"""Safe display of untrusted strings (from a broker, another worker, a file's name)."""

_IN_CODE = str.maketrans({"`": "'", "|": "/"})


def shown(text: str) -> str:
    """Make one line of a text, with "?" for each character that cannot be printed.

    These are control characters, including newlines and the escape sequences of terminals, marks that change the
    direction of writing, and characters without a glyph. The result is not safe in Markdown; see `in_markdown`.
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def in_markdown(text: str) -> str:
    """Make a Markdown code span of a text, without HTML, links, headings or the end of a table's cell."""
    return f"`{shown(text).translate(_IN_CODE)}`"
