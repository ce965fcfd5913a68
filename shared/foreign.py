"""Strings that came from elsewhere (a broker, another worker, a file's name), shown as text and as nothing else."""

_IN_CODE = str.maketrans({"`": "'", "|": "/"})


def shown(text: str) -> str:
    """Make one line of a text, with "?" for each character that cannot be printed.

    What cannot be printed: control characters, and with them newlines and the escape sequences of terminals; marks that
    turn the direction of writing; characters without a picture. A line on a screen knows no markup; see `in_markdown`.
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def in_markdown(text: str) -> str:
    """Make a code span of a text, in which Markdown knows no HTML, link, heading or end of a table's cell."""
    return f"`{shown(text).translate(_IN_CODE)}`"
