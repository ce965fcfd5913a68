"""Identities: their files, their text and their words."""

from __future__ import annotations

import re

import pytest

from nightsplit.shared.config.section import PublicKeyText
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.trust.identity import PublicKey, make_identity, read_identity


def test_an_identity_is_read_as_it_was_made(tmp_path):
    made = make_identity(tmp_path / "identity.key")
    assert read_identity(tmp_path / "identity.key").public == made.public
    assert made.public.verifies(made.sign(b"statement"), b"statement")
    assert not made.public.verifies(made.sign(b"statement"), b"another statement")
    assert re.fullmatch(PublicKeyText.__metadata__[0].pattern, made.public.text)


def test_an_identity_that_others_may_read_is_refused(tmp_path):
    make_identity(tmp_path / "identity.key")
    (tmp_path / "identity.key").chmod(0o640)
    with pytest.raises(ConfigError) as found:
        read_identity(tmp_path / "identity.key")
    assert found.value.number == 113


def test_words_are_those_of_the_hash():
    """SHA-256 of 32 zero bytes begins with 0x6668, which is "kinom" in the spelling of arXiv:0901.4016."""
    zero = PublicKey("ed25519:" + "A" * 43 + "=")
    words = zero.words.split()
    assert len(words) == 6
    assert all(re.fullmatch("([bdfghjklmnprstvz][aiou]){2}[bdfghjklmnprstvz]", word) for word in words)
    assert words[0] == "kinom"


def test_a_key_that_is_no_point_verifies_nothing():
    assert not PublicKey("ed25519:" + "/" * 42 + "8=").verifies(bytes(64), b"")
