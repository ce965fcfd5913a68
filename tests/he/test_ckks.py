"""Ciphertexts and keys: what a receiver refuses, and who can read what."""

import math
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.he.ckks import CkksParameters, PublicKeys, to_bytes
from nightsplit.shared.he.weights import FloatArray
from nightsplit.site_worker.query.keys import SecretKeys

# ── what is refused ─────────────────────────────────────────────────────────────────────────────

LITTLE = CkksParameters(4096, (30, 24, 24, 31), 24)
LARGE = CkksParameters(8192, (38, 33, 33, 33, 33, 48), 33)


@dataclass
class Little:
    """Keys and a ciphertext as bytes."""

    secret: SecretKeys
    public: PublicKeys
    ciphertext: bytes

    def computed(self, relin: bytes, galois: bytes, ciphertext: bytes) -> FloatArray:
        """As a server and a site do it together."""
        arithmetic = Arithmetic(LITTLE, PublicKeys(relin, galois), (1,))
        given = LITTLE.read(ciphertext, 2)
        product = arithmetic.dot([(arithmetic.rotate(given, 1), given)])
        answer = to_bytes(arithmetic.drop_levels(arithmetic.weighted_sum([0.5], [product], 0.25)))
        return self.secret.decrypt(LITTLE.read_any(answer))


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Little:
    secret, public = SecretKeys.make(LITTLE, tmp_path_factory.mktemp("little"), (1,))
    return Little(secret, public, secret.encrypt(np.linspace(-1, 1, LITTLE.slots), 2))


def refused(work: Callable[[], object]) -> None:
    with pytest.raises(Refused) as caught:
        work()
    assert caught.value.number == 313


def test_a_computation_with_the_bytes_as_sent(little: Little) -> None:
    found = little.computed(little.public.relin, little.public.galois, little.ciphertext)
    given = np.linspace(-1, 1, LITTLE.slots)
    assert np.abs(found[:-1] - (0.5 * given[:-1] * given[1:] + 0.25)[...]).max() < 0.05


parts = st.sampled_from(["relin", "galois", "ciphertext", "long ciphertext"])


def altered_or_refused(little: Little, part: str, alter: Callable[[bytes], bytes]) -> None:
    """Never an exception of another kind, and numbers in every slot otherwise."""
    sent = {"relin": little.public.relin, "galois": little.public.galois, "ciphertext": little.ciphertext}
    if part == "long ciphertext":  # both parts in full, in place of the second's seed
        part, sent["ciphertext"] = "ciphertext", to_bytes(LITTLE.read(little.ciphertext, 2))
    sent[part] = alter(sent[part])
    try:
        assert little.computed(**sent).shape == (LITTLE.slots,)
    except Refused as refusal:
        assert refusal.number == 313  # noqa: PT017


@settings(max_examples=150, deadline=None)
@given(part=parts, position=st.integers(0, 99) | st.integers(0, 2**20), flip=st.integers(1, 255))
def test_altered_bytes(little: Little, part: str, position: int, flip: int) -> None:
    def alter(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]

    altered_or_refused(little, part, alter)


@settings(deadline=None)
@given(part=parts, length=st.integers(0, 99) | st.integers(0, 2**20))
def test_bytes_that_end_early(little: Little, part: str, length: int) -> None:
    altered_or_refused(little, part, lambda content: content[: length % len(content)])


@settings(deadline=None)
@given(part=parts, content=st.binary(max_size=200), header=st.booleans())
def test_garbage(little: Little, part: str, content: bytes, header: bool) -> None:
    altered_or_refused(little, part, lambda sent: (sent[:16] if header else b"") + content)


def uncompressed(content: bytes) -> bytes:
    """The numbers of a file of SEAL, behind its header of 16 bytes."""
    return zstandard.ZstdDecompressor().decompressobj().decompress(content[16:])


def forged(numbers: bytes) -> bytes:
    """A file of SEAL with these numbers, uncompressed."""
    return b"\x5e\xa1\x10\x04\x03" + bytes(3) + struct.pack("<Q", 16 + len(numbers)) + numbers


FORM, SCALE = 32, 57
"""Where a ciphertext's representation and scale are in `uncompressed`."""


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (FORM, b"\0"),
        *[(SCALE, struct.pack("<d", scale)) for scale in (0.0, -1.0, 2.0**23, 2.0**900, math.inf, math.nan)],
        (-3 * 4096 * 8, bytes(3 * 4096 * 8)),  # the second part: anybody can read the first then
    ],
)
def test_a_forged_ciphertext(little: Little, at: int, new: bytes) -> None:
    """Well-formed files, with what SEAL itself lets pass."""
    content = to_bytes(LITTLE.read(little.ciphertext, 2))
    numbers = uncompressed(content)
    assert numbers[FORM] == 1
    assert numbers[SCALE : SCALE + 8] == struct.pack("<d", 2.0**24)
    assert np.array_equal(
        little.secret.decrypt(LITTLE.read(forged(numbers), 2)), little.secret.decrypt(LITTLE.read(content, 2))
    )
    at %= len(numbers)
    refused(lambda: LITTLE.read(forged(numbers[:at] + new + numbers[at + len(new) :]), 2))
    refused(lambda: LITTLE.read_any(forged(numbers[:at] + new + numbers[at + len(new) :])))


def test_another_level(little: Little) -> None:
    for level in (0, 1):
        refused(lambda level=level: LITTLE.read(little.secret.encrypt(np.ones(3), level), 2))  # type: ignore[misc]
    lower = little.secret.encrypt(np.ones(3), 1)
    assert LITTLE.level_of(LITTLE.read(lower, 1)) == 1
    numbers = uncompressed(lower)
    pretends = numbers[:SCALE] + struct.pack("<d", LITTLE.scales[2]) + numbers[SCALE + 8 :]
    assert LITTLE.level_of(LITTLE.read_any(forged(pretends))) == 1
    refused(lambda: LITTLE.read(forged(pretends), 2))


def test_another_circuit(little: Little) -> None:
    refused(lambda: LARGE.read(little.ciphertext, 4))
    refused(lambda: Arithmetic(LARGE, little.public))
    other = CkksParameters(4096, (31, 24, 24, 30), 24)  # other primes of the same number
    refused(lambda: other.read(little.ciphertext, 2))


def test_keys_that_do_not_suffice(little: Little) -> None:
    public = little.public
    refused(lambda: Arithmetic(LITTLE, public, (1, 2)))
    refused(lambda: Arithmetic(LITTLE, PublicKeys(public.relin, b""), (1,)))
    refused(lambda: Arithmetic(LITTLE, PublicKeys(public.galois, public.relin)))  # of the same form
    refused(lambda: Arithmetic(LITTLE, PublicKeys(public.relin, public.relin), (1,)))


@pytest.mark.parametrize("ckks", [
    CkksParameters(4096, (30, 30, 30, 30), 30), CkksParameters(8192, (60, 60, 60, 60), 30),
    CkksParameters(2048, (30, 30), 20),
])  # fmt: skip
def test_less_than_128_bits_of_security(ckks: CkksParameters) -> None:
    with pytest.raises(ValueError, match="secur"):
        ckks.context  # noqa: B018


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


def test_the_secret_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    secret, public = SecretKeys.make(LITTLE, tmp_path / "keys")
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["secret.key"]
    assert stat.S_IMODE((tmp_path / "keys" / "secret.key").stat().st_mode) == 0o600
    again = SecretKeys.read(LITTLE, tmp_path / "keys")
    sent = LITTLE.read(secret.encrypt(np.array([0.5, -0.25]), 2), 2)
    assert again.decrypt(sent)[:2] == pytest.approx([0.5, -0.25], abs=1e-3)
    assert public.galois == b""


def test_nobody_else_can_decrypt(little: Little, tmp_path: Path) -> None:
    other, _ = SecretKeys.make(LITTLE, tmp_path)
    assert np.abs(other.decrypt(LITTLE.read(little.ciphertext, 2))).mean() > 1000


def test_the_same_numbers_never_look_the_same(little: Little) -> None:
    assert little.secret.encrypt(np.ones(3), 2) != little.secret.encrypt(np.ones(3), 2)


@pytest.mark.parametrize("content", [None, b"", b"nothing of the kind", bytes(16)])
def test_a_secret_key_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "secret.key").write_bytes(content)
    with pytest.raises(StateError) as caught:
        SecretKeys.read(LITTLE, tmp_path)
    assert caught.value.number == 511


def test_a_secret_key_of_another_circuit(tmp_path: Path) -> None:
    SecretKeys.make(LITTLE, tmp_path)
    with pytest.raises(StateError) as caught:
        SecretKeys.read(LARGE, tmp_path)
    assert caught.value.number == 511


def test_the_secret_key_is_in_nothing_that_is_sent(tmp_path: Path) -> None:
    """Neither its file's bytes nor its numbers, in the form in which SEAL holds and writes them.

    That public keys do not tell it in other ways is the hardness of ring learning with errors, and no test's.
    """
    secret, public = SecretKeys.make(LITTLE, tmp_path, (1, 2))
    file = (tmp_path / "secret.key").read_bytes()
    short = secret.encrypt(np.linspace(-1, 1, LITTLE.slots), 2)
    sent = {"relin": public.relin, "galois": public.galois, "short": short, "long": to_bytes(LITTLE.read(short, 2))}
    key = uncompressed(file)
    assert len(key) > 4 * 4096 * 8  # for each of four primes, 4096 numbers
    windows = [key[at : at + 32] for at in range(len(key) - 4 * 4096 * 8, len(key), 1024)]
    packed = [file[at : at + 16] for at in range(32, len(file) - 16, 512)]
    assert len(windows) == 128
    assert min(len(set(window)) for window in windows) > 4  # no zeros that would be found anywhere

    def found(content: bytes) -> bool:
        numbers = uncompressed(content)
        return any(window in numbers for window in windows) or any(window in content for window in packed)

    assert found(file)
    assert not any(map(found, sent.values()))
    for content in sent.values():  # the search sees a key wherever it is
        assert any(window in uncompressed(content) + key[-4096:] for window in windows)


def test_the_name_of_public_keys() -> None:
    names = {PublicKeys(*parts).sha256 for parts in [(b"ab", b"c"), (b"a", b"bc"), (b"abc", b""), (b"ab", b"d")]}
    assert len(names) == 4
    assert PublicKeys(b"ab", b"c").sha256 == PublicKeys(b"ab", b"c").sha256
