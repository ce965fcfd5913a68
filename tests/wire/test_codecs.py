"""Codecs one by one: what they keep, what they lose, what they refuse."""

from __future__ import annotations

import gc
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import zstandard

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import codecs as tensors
from nightsplit.shared.wire.codecs import DTYPES, Codec, Entry, decode, encode, encoded_size, is_finite

LOSSY: tuple[Codec, ...] = ("fp16", "bf16", "int8")
ERROR = {"fp16": 2**-11, "bf16": 2**-8}
FLOAT_MAX = torch.finfo(torch.float32).max


def there_and_back(tensor: torch.Tensor, codec: Codec, zstd: bool = False) -> torch.Tensor:
    entry, data = encode("x", tensor, codec, zstd)
    assert entry.nbytes == len(data)
    assert zstd or entry.nbytes == entry.encoded_size
    result = decode(entry, bytes(data), 0)
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    return result


def refused(number: int) -> pytest.RaisesExc[Refused]:
    return pytest.RaisesExc(Refused, check=lambda error: error.number == number)


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_raw_keeps_every_dtype(dtype: torch.dtype, zstd: bool) -> None:
    tensor = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4, 5)).to(dtype)
    assert torch.equal(there_and_back(tensor, "raw", zstd), tensor)


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e7, 1e30])
@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_half_precision_error_does_not_depend_on_the_scale(codec: Codec, scale: float, zstd: bool) -> None:
    tensor = torch.randn(8, 16, 6, 6) * scale
    error = (there_and_back(tensor, codec, zstd) - tensor).abs()
    # fp16 values more than 29 octaves below the largest are subnormal: an absolute bound for them.
    assert (error <= tensor.abs() * ERROR[codec] + tensor.abs().max() * 2**-39).all()


def test_gradients_of_1e_6_stay_out_of_fp16_subnormals() -> None:
    gradient = torch.randn(64, 16, 8, 8) * 1e-6
    scaled = (there_and_back(gradient, "fp16") - gradient).norm() / gradient.norm()
    plain = (gradient.half().float() - gradient).norm() / gradient.norm()
    assert scaled < 3e-4
    assert plain > 30 * scaled


@pytest.mark.parametrize("shape", [(8, 16, 6, 6), (8, 16, 7), (8, 100), (100,), ()])
def test_int8_error_is_half_a_step_of_its_own_row(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    if len(shape) > 1:  # rows of very different size must not share a scale
        tensor *= torch.logspace(-10, 10, 8).reshape(8, *[1] * (len(shape) - 1))
    rows = math.prod(shape[: len(shape) - 1][:2])
    largest = tensor.reshape(rows, -1).abs().amax(1, keepdim=True)
    error = (there_and_back(tensor, "int8") - tensor).reshape(rows, -1).abs()
    assert (error <= largest / 127 * 0.5001).all()
    assert encode("x", tensor, "int8", False)[0].nbytes == 4 * rows + tensor.numel()


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("codec", get_args(Codec))
def test_zeros_stay_zeros(codec: Codec, zstd: bool) -> None:
    tensor = torch.zeros(2, 3, 4)
    assert torch.equal(there_and_back(tensor, codec, zstd), tensor)


@pytest.mark.parametrize("value", [FLOAT_MAX, -FLOAT_MAX, 1e-38, -1e-45, 2.0**-112, 2.0**100])
@pytest.mark.parametrize("codec", LOSSY)
def test_extreme_values_stay_finite(codec: Codec, value: float) -> None:
    tensor = torch.full((2, 3, 4), value)
    tensor[0] = 0
    result = there_and_back(tensor, codec)
    assert torch.isfinite(result).all()
    assert torch.allclose(result, tensor, rtol=0.005, atol=2e-38)


@pytest.mark.parametrize("codec", get_args(Codec))
def test_any_strides_and_no_dimension(codec: Codec) -> None:
    base = torch.randn(6, 4, 10)
    for tensor in (base.transpose(0, 2), base[::2, :, ::3], base.expand(2, 6, 4, 10), torch.tensor(1.5)):
        same = encode("x", tensor.contiguous().clone(), codec, False)
        entry, data = encode("x", tensor, codec, False)
        assert (entry, bytes(data)) == (same[0], bytes(same[1]))
        there_and_back(tensor, codec)


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("codec", get_args(Codec))
def test_same_tensor_same_bytes_whatever_the_threads(codec: Codec, zstd: bool) -> None:
    tensor = torch.randn(16, 16, 32, 32)
    threads, seen = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            seen.add(bytes(encode("x", tensor.clone(), codec, zstd)[1]))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


@pytest.mark.parametrize("codec", ["raw", "fp32"])
def test_no_copy_in_either_direction(codec: Codec) -> None:
    tensor = torch.randn(4, 5)
    entry, data = encode("x", tensor, codec, False)
    tensor[0, 0] = 7.0
    assert torch.frombuffer(bytearray(data[:4]), dtype=torch.float32) == 7.0
    body = bytes(64) + bytes(data)
    result = decode(entry, body, 64)
    assert result.data_ptr() == torch.frombuffer(body, dtype=torch.uint8).data_ptr() + 64


def test_a_view_keeps_the_body_alive() -> None:
    entry, data = encode("x", torch.arange(100_000), "raw", False)
    result = decode(entry, bytes(data), 0)
    gc.collect()
    assert torch.equal(result, torch.arange(100_000))


def test_parameters_with_gradient_are_encoded() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    for codec in get_args(Codec):
        there_and_back(weight, codec)


def test_is_finite_looks_closer_when_the_sum_overflows() -> None:
    assert is_finite(torch.full((10,), FLOAT_MAX))
    assert is_finite(torch.full((10,), 60000.0, dtype=torch.float16))
    assert is_finite(torch.tensor([2**62] * 10))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", get_args(Codec))
def test_307_not_finite_in_both_directions(codec: Codec, value: float) -> None:
    tensor = torch.ones(2, 3, 4)
    tensor[1, 2, 3] = value
    with refused(307):
        encode("x", tensor, codec, False)
    entry, data = encode("x", torch.ones(2, 3, 4), codec, False)
    damaged = bytearray(data)
    bad = torch.tensor([value], dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(codec, torch.float32))
    bad_bytes = bytes(bad.view(torch.uint8).tolist())
    damaged[: len(bad_bytes)] = bad_bytes  # a value, or the first scale
    with refused(307):
        decode(entry, bytes(damaged), 0)


def test_305_what_may_not_travel() -> None:
    for tensor in (
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
    ):
        with refused(305):
            encode("x", tensor, "raw", False)
    for codec in ("fp32", *LOSSY):
        with refused(305):
            encode("x", torch.ones(2, dtype=torch.int64), codec, False)


def test_305_a_bool_that_is_neither() -> None:
    entry, _ = encode("x", torch.tensor([True, False]), "raw", False)
    with refused(305):
        decode(entry, b"\1\2", 0)


def test_305_parameter_out_of_range() -> None:
    entry, data = encode("x", torch.ones(2), "fp16", False)
    for parameter in (127, -114, 10**30):
        with refused(305):
            decode(replace(entry, parameter=parameter), bytes(data), 0)
    with refused(305):
        decode(replace(entry, codec="bf16", parameter=1), bytes(data), 0)


def test_306_empty() -> None:
    with refused(306):
        encode("x", torch.ones(0, 3), "raw", False)


def test_309_wrong_length() -> None:
    entry, data = encode("x", torch.ones(4), "fp32", False)
    for bad, body in (
        (replace(entry, nbytes=12), data),
        (entry, data[:12]),
        (replace(entry, shape=(5,)), data),
    ):
        with refused(309):
            decode(bad, bytes(body), 0)


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


def framed(data: bytes, shape: tuple[int, ...]) -> Entry:
    return Entry("x", "raw", True, torch.uint8, shape, 0, len(data))


def test_311_bomb_is_refused_before_it_unfolds() -> None:
    data = bomb(512 * 2**20)
    assert len(data) < 50_000
    tracemalloc.start()
    with refused(311):
        decode(framed(data, (1000,)), data, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def unsized(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


@pytest.mark.parametrize(
    "data",
    [
        unsized(bytes(1000)),
        bomb(999),
        bomb(1001),
        bomb(1000) + b"\0",
        bomb(1000) + bomb(1000),
        bomb(1000)[:-1],
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
        b"not zstd at all",
        b"",
    ],
    ids=["unsized", "short", "long", "trailing", "twice", "cut", "skippable", "noise", "empty"],
)
def test_311_frames_that_are_not_exactly_right(data: bytes) -> None:
    with refused(311):
        decode(framed(data, (1000,)), data, 0)


def test_311_a_frame_that_lies_about_its_size() -> None:
    honest = bomb(1000)
    assert zstandard.frame_content_size(honest) == 1000
    for stated in (900, 1100):
        # single segment, content size in two bytes, stored as size - 256
        lying = honest[:5] + (stated - 256).to_bytes(2, "little") + honest[7:]
        assert zstandard.frame_content_size(lying) == stated
        with refused(311):
            decode(framed(lying, (stated,)), lying, 0)


def test_a_codec_without_encoder_fails_the_import() -> None:
    source = Path(tensors.__file__).read_text(encoding="utf-8")
    more = source.replace('FloatCodec = Literal["fp32",', 'FloatCodec = Literal["fp8", "fp32",')
    assert more != source
    with pytest.raises(ImportError, match="fp8"):
        exec(compile(more, tensors.__file__, "exec"), {"__name__": tensors.__name__})


@pytest.mark.parametrize("codec", get_args(Codec))
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
def test_the_planned_size_is_what_is_sent(codec: Codec, shape: tuple[int, ...]) -> None:
    entry, data = encode("a", torch.ones(shape), codec, zstd=False)
    assert encoded_size(codec, torch.float32, shape) == entry.nbytes == len(data)


def test_every_number_raised_has_a_remedy() -> None:
    assert set(tensors.REMEDIES) == set(range(301, 310)) | {311}
