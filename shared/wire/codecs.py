"""Codecs between tensors and bytes.

    codec   bytes per value   parameter        precision lost
    raw     as in memory      0                nothing (any dtype of `DTYPES`)
    fp32    4                 0                nothing
    fp16    2                 exponent k       below 2^-11 of each value: fp16 of x * 2^k
    bf16    2                 0                below 2^-8 of each value
    int8    1 + scales        0                half a step of 1/127 of the row's largest value

All but "raw" need dtype float32. Bytes are little-endian. Every dimension is >= 1, floating-point
values are finite. Equal tensors give equal bytes on any processor and with any number of threads:
each operation below is exact, or rounds as IEEE 754 demands.
"""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import zstandard

from nightsplit.shared.errors import Refused

FloatCodec = Literal["fp32", "fp16", "bf16", "int8"]
"""Codecs of float32 that a run can choose."""
Codec = Literal["raw", FloatCodec]

if sys.byteorder != "little":
    raise ImportError("nightsplit puts tensors on the wire as they lie in memory: little-endian")

with warnings.catch_warnings():
    # torch warns once per process about a tensor over read-only bytes. Ours are never written in
    # place (see `Message`), and a filter around each call would not be thread-safe.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Dtypes allowed in a message, by their name on the wire."""

REMEDIES: dict[int, str] = {
    301: "allow only nightsplit workers to publish here, and inspect the dead letter and its reason.",
    302: "run the same nightsplit version at the site and at the server.",
    303: "run the same nightsplit version at the site and at the server.",
    304: "give site and server the same run.toml and the same nightsplit version.",
    305: "give site and server the same run.toml and the same nightsplit version.",
    306: "give site and server the same run.toml: the model and the cut decide the shapes.",
    307: "lower the learning rate or clip gradients at the sender, and check its data for NaN.",
    308: "use a smaller batch or a smaller codec, or raise the limit at the broker and in run.toml.",
    309: "inspect the dead letter and its reason, and any proxy between site and broker.",
    311: "inspect the dead letter and its reason; a nightsplit worker never sends such bytes.",
}


def refusal(number: int, sentence: str) -> Refused:
    """Return the `Refused` with this number and its remedy."""
    return Refused(number, sentence, REMEDIES[number])


@dataclass(frozen=True, slots=True)
class Entry:
    """Description of an encoded tensor: one row of the header.

    Attributes:
        name: name of the tensor within its message.
        codec: key of the table above.
        zstd: whether the encoded bytes are one zstd frame that states its content size.
        dtype: dtype before encoding and after decoding.
        shape: length per dimension, each >= 1.
        parameter: the codec's parameter, an integer.
        nbytes: bytes on the wire.
    """

    name: str
    codec: Codec
    zstd: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: int
    nbytes: int

    @property
    def encoded_size(self) -> int:
        """Encoded bytes before compression."""
        return encoded_size(self.codec, self.dtype, self.shape)


def encoded_size(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Return the encoded bytes of a tensor before compression; they depend on dtype and shape alone."""
    return _METHODS[codec].size(dtype, shape)


def encode(name: str, tensor: torch.Tensor, codec: Codec, zstd: bool) -> tuple[Entry, bytes | memoryview]:
    """Encode a dense CPU tensor of any strides, float32 unless the codec is "raw"; with `zstd`, compress it at level 1.

    With "raw" and "fp32" and no zstd the bytes are a view of a contiguous tensor's own memory: it
    must not be written to until they have been sent.

    Raises:
        Refused: 305 dtype, layout or device; 306 a dimension of 0; 307 not finite.
    """
    tensor = tensor.detach()
    _check_dtype(name, tensor.dtype, codec)
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise refusal(305, f"Tensor '{name}' is {tensor.layout} on {tensor.device}, not dense on the CPU.")
    if tensor.numel() == 0:
        raise refusal(306, f"Tensor '{name}' of shape {tuple(tensor.shape)} is empty.")
    _check_values(name, tensor)
    encoded, parameter = _METHODS[codec].encode(tensor)
    data: bytes | memoryview = encoded.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if zstd:
        data = zstandard.ZstdCompressor(level=1).compress(data)
    return Entry(name, codec, zstd, tensor.dtype, tuple(tensor.shape), parameter, len(data)), data


def decode(entry: Entry, body: bytes, offset: int) -> torch.Tensor:
    """Decode the bytes of `body` at `offset` into a tensor of the entry's dtype and shape.

    "raw" and "fp32" without zstd give a view of `body`: never write to it in place.

    Raises:
        Refused: 305 dtype, parameter or an invalid bool; 307 not finite; 309 the entry's length
            does not match its shape or runs past the body; 311 the zstd frame.
    """
    _check_dtype(entry.name, entry.dtype, entry.codec)
    method = _METHODS[entry.codec]
    if entry.parameter not in method.parameters:
        raise refusal(305, f"Tensor '{entry.name}' has parameter {entry.parameter} for {entry.codec}.")
    if not 0 <= offset <= offset + entry.nbytes <= len(body):
        raise refusal(309, f"Tensor '{entry.name}' runs past the end of the message.")
    if entry.zstd:
        body, offset = _decompress(entry, memoryview(body)[offset : offset + entry.nbytes]), 0
    elif entry.nbytes != entry.encoded_size:
        raise refusal(309, f"Tensor '{entry.name}' has {entry.nbytes} bytes, its shape takes {entry.encoded_size}.")
    tensor = method.decode(entry, body, offset)
    _check_values(entry.name, tensor)
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; always True for integers and bool."""
    if not tensor.is_floating_point():
        return True
    # A sum is finite only if all its terms are, and costs a quarter of a search. Search only when
    # the sum overflows, which proves nothing.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _check_dtype(name: str, dtype: torch.dtype, codec: Codec) -> None:
    if dtype not in DTYPES.values() or (codec != "raw" and dtype != torch.float32):
        raise refusal(305, f"Tensor '{name}' of {dtype} cannot travel as {codec}.")


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not is_finite(tensor):
        raise refusal(307, f"Tensor '{name}' holds NaN or infinite values.")
    if tensor.dtype == torch.bool and tensor.view(torch.uint8).amax() > 1:
        raise refusal(305, f"Tensor '{name}' of dtype bool holds bytes other than 0 and 1.")


def _decompress(entry: Entry, frame: memoryview) -> bytes:
    """Decompress exactly `entry.encoded_size` bytes, and none if the frame announces any other size.

    zstandard ignores `max_output_size` when a frame states its content size: 16 KB could become
    512 MB. So the stated size, which is also the size allocated, is compared first.
    """
    try:
        stated = zstandard.frame_content_size(frame)
        if stated != entry.encoded_size:
            size = "no size" if stated < 0 else f"{stated} bytes"
            raise refusal(311, f"Tensor '{entry.name}' announces {size}, its shape takes {entry.encoded_size}.")
        # Also raises when the frame holds less or more than it states.
        return bytes(zstandard.ZstdDecompressor().decompress(frame, stated, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise refusal(311, f"Tensor '{entry.name}' does not decompress: {error}.") from error


def _view(body: bytes, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _decode_plain(entry: Entry, body: bytes, offset: int) -> torch.Tensor:
    return _view(body, offset, entry.dtype, entry.shape)


_BF16_MAX = torch.finfo(torch.bfloat16).max  # larger values may round up to infinity
_EXPONENTS = range(-113, 127)  # -113 for float32's maximum; 126 is the last k for which 2^k and 2^-k are normal


def _encode_fp16(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    # Gradients of 1e-6 would be fp16 subnormals of a few bits. A power of two that lifts the
    # largest value to [2^14, 2^15) costs no precision, and leaves 29 octaves of normal numbers.
    largest = tensor.abs().amax().item()
    if largest > _BF16_MAX:
        return _encode_fp16(tensor.clamp(-_BF16_MAX, _BF16_MAX))
    exponent = min(15 - math.frexp(largest)[1], _EXPONENTS[-1]) if largest else 0
    return (tensor * 2.0**exponent).to(torch.float16), exponent


def _decode_fp16(entry: Entry, body: bytes, offset: int) -> torch.Tensor:
    return _view(body, offset, torch.float16, entry.shape).to(torch.float32).mul_(2.0**-entry.parameter)


def _encode_bf16(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    encoded = tensor.to(torch.bfloat16)
    if not is_finite(encoded):
        encoded = tensor.clamp(-_BF16_MAX, _BF16_MAX).to(torch.bfloat16)
    return encoded, 0


def _decode_bf16(entry: Entry, body: bytes, offset: int) -> torch.Tensor:
    return _view(body, offset, torch.bfloat16, entry.shape).to(torch.float32)


_SCALE_MIN = torch.finfo(torch.float32).tiny  # divisor of a row of zeros
_SCALE_MAX = torch.finfo(torch.float32).max / 127 * (1 - 2**-24)  # 127 times this is still finite


def _rows(shape: tuple[int, ...]) -> int:
    """Return the number of int8 scales: one per (sample, channel), per sample in two dimensions, else one."""
    return math.prod(shape[: min(2, max(0, len(shape) - 1))])


def _encode_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    rows = _rows(tuple(tensor.shape))
    values = tensor.reshape(rows, -1)
    scales = (values.abs().amax(1) / 127).clamp_(_SCALE_MIN, _SCALE_MAX)
    encoded = torch.empty(rows * 4 + values.numel(), dtype=torch.uint8)
    encoded[: rows * 4].view(torch.float32).copy_(scales)
    steps = (values / scales[:, None]).round_()
    encoded[rows * 4 :].view(torch.int8).view(rows, -1).copy_(steps)
    return encoded, 0


def _decode_int8(entry: Entry, body: bytes, offset: int) -> torch.Tensor:
    rows = _rows(entry.shape)
    scales = _view(body, offset, torch.float32, (rows, 1))
    steps = _view(body, offset + rows * 4, torch.int8, (rows, math.prod(entry.shape) // rows))
    return (steps * scales).view(entry.shape)


@dataclass(frozen=True, slots=True)
class _Method:
    """Implementation of a codec.

    `encode` returns a tensor whose bytes are sent, and the parameter; `decode` reads the bytes at
    an offset; `size` returns the number of bytes for a dtype and shape.
    """

    encode: Callable[[torch.Tensor], tuple[torch.Tensor, int]]
    decode: Callable[[Entry, bytes, int], torch.Tensor]
    size: Callable[[torch.dtype, tuple[int, ...]], int]
    parameters: range = range(1)


_METHODS: dict[Codec, _Method] = {
    "raw": _Method(lambda tensor: (tensor, 0), _decode_plain, lambda dtype, shape: math.prod(shape) * dtype.itemsize),
    "fp32": _Method(lambda tensor: (tensor, 0), _decode_plain, lambda dtype, shape: math.prod(shape) * 4),
    "fp16": _Method(_encode_fp16, _decode_fp16, lambda dtype, shape: math.prod(shape) * 2, _EXPONENTS),
    "bf16": _Method(_encode_bf16, _decode_bf16, lambda dtype, shape: math.prod(shape) * 2),
    "int8": _Method(_encode_int8, _decode_int8, lambda dtype, shape: math.prod(shape) + _rows(shape) * 4),
}
if set(_METHODS) != set(get_args(Codec)):
    raise ImportError(f"codecs without an implementation or unknown: {set(_METHODS) ^ set(get_args(Codec))}")
