"""Codes to bytes and back, codes to values and back; literals first, then the identities for every bit width."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import pack, packed_bytes, unpack
from r2cli.quantized.palette import Palette, from_vectors, to_vectors

BITS = range(1, 9)
SCALES = st.floats(1e-6, 1e3, allow_nan=False)


def grid(
    bits: int,
    scale: float | list[float] = 1.0,
    *,
    zero: int | list[int] = 0,
    signed: bool = True,
    axis: int | None = None,
    midrise: bool = False,
) -> Grid:
    step = torch.tensor(scale, dtype=torch.float32)
    return Grid(step, torch.tensor(zero, dtype=torch.int32).expand(step.shape), bits, signed, axis, midrise)


def every_code(codec: Grid) -> Tensor:
    return torch.arange(codec.lowest, codec.highest + 1).to(codec.dtype)


# --- packing -------------------------------------------------------------------------------------------------------

PACKED = [
    (8, [-128, -1, 0, 127], [0x80, 0xFF, 0x00, 0x7F]),
    (7, [-64, -1, 63], [0x40, 0x7F, 0x3F]),
    (6, [-32, -1, 31], [0x20, 0x3F, 0x1F]),
    (5, [-16, -1, 15], [0x10, 0x1F, 0x0F]),
    (4, [1, -2, 3], [0xE1, 0x03]),
    (4, [15, 0, 8], [0x0F, 0x08]),
    (3, [5, 2, 7, 0], [0b0101, 0b00111001]),  # high bits 1 0 1 0; low bits 1 2 3 0
    (3, [-4, 3, -1], [0b101, 0b111100]),  # two's complement 4 3 7: high bits 1 0 1; low bits 0 3 3
    (3, [4] * 9, [0xFF, 0x01, 0x00, 0x00, 0x00]),  # a plane each: 9 high bits in 2 bytes, 9 pairs in 3
    (2, [-2, -1, 0, 1], [0b01001110]),
    (2, [1, 2, 3, 0, 1], [0b00111001, 0b01]),
    (1, [1, 0, 0, 1, 1, 0, 0, 0, 1], [0b00011001, 0b1]),
    (1, [-1, 0, -1], [0b101]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), PACKED)
def test_packed_bytes_are_these(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected


@pytest.mark.slow
@given(
    st.sampled_from(BITS).flatmap(
        lambda bits: st.booleans().flatmap(
            lambda signed: st.tuples(
                st.just(bits),
                st.just(signed),
                st.lists(
                    st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1),
                    max_size=70,
                ),
            )
        )
    )
)
def test_unpack_undoes_pack(case: tuple[int, bool, list[int]]) -> None:
    bits, signed, codes = case
    given_codes = torch.tensor(codes, dtype=torch.int8 if signed else torch.uint8)
    packed = pack(given_codes, bits)
    assert packed.numel() == packed_bytes(len(codes), bits)
    back = unpack(packed, bits, len(codes), signed)
    assert back.dtype == given_codes.dtype
    assert back.tolist() == codes


@pytest.mark.parametrize(("bits", "nine_codes"), [(8, 9), (7, 9), (6, 9), (5, 9), (4, 5), (3, 2 + 3), (2, 3), (1, 2)])
def test_packed_size_of_nine_codes(bits: int, nine_codes: int) -> None:
    assert packed_bytes(9, bits) == nine_codes


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_four_bits_are_the_bytes_of_onnx(signed: bool, count: int) -> None:
    kind = ml_dtypes.int4 if signed else ml_dtypes.uint4
    lowest = -8 if signed else 0
    codes = (np.arange(count) * 5) % 16 + lowest
    theirs = onnx.numpy_helper.from_array(codes.astype(np.int8).astype(kind)).raw_data
    assert bytes(pack(torch.from_numpy(codes), 4).tolist()) == theirs


# --- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "lowest", "highest", "dtype"),
    [
        (grid(1), -1, 0, torch.int8),
        (grid(2), -2, 1, torch.int8),
        (grid(4), -8, 7, torch.int8),
        (grid(8), -128, 127, torch.int8),
        (grid(1, signed=False), 0, 1, torch.uint8),
        (grid(8, signed=False), 0, 255, torch.uint8),
        (grid(1, midrise=True), 0, 1, torch.uint8),
        (grid(8, midrise=True), 0, 255, torch.uint8),
    ],
)
def test_codes_run_from_lowest_to_highest(codec: Grid, lowest: int, highest: int, dtype: torch.dtype) -> None:
    assert (codec.lowest, codec.highest, codec.dtype) == (lowest, highest, dtype)


@pytest.mark.parametrize(
    ("codec", "values", "codes"),
    [
        # Halves go to the even code.
        (grid(8), [0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [0, 2, 2, 0, -2, -2]),
        # Values beyond the ends saturate, the ends of a half-open step too (7.5 rounds to 8, -8.5 to -8).
        (grid(4), [7.4, 7.5, 1e30, -8.5, -8.6, -1e30], [7, 7, 7, -8, -8, -8]),
        (grid(8), [127.5, float("inf"), -128.5, float("-inf")], [127, 127, -128, -128]),
        (grid(2, 0.5), [-9.0, -1.0, -0.5, 0.0, 0.25, 0.75, 9.0], [-2, -2, -1, 0, 0, 1, 1]),
        # The zero point is added after the rounding: 0.25 / 0.5 + 3 would round to 4.
        (grid(4, 0.5, zero=3, signed=False), [-9, -1.5, 0.0, 0.25, 0.75, 6.0, 9.0], [0, 0, 3, 3, 5, 15, 15]),
        (grid(8, 2.0, zero=-3), [-1000.0, 0.0, 1.0, 3.0, 1000.0], [-128, -3, -3, -1, 127]),
        # A midrise grid's ties go to the even code as well: 0 is between codes 1 and 2, -1 between 0 and 1.
        (grid(2, 0.5, midrise=True), [-9.0, -1.0, -0.6, 0.0, 0.1, 1.0, 9.0], [0, 0, 1, 2, 2, 2, 3]),
        (grid(1, 0.5, midrise=True), [-3.0, -0.1, 0.0, 0.1, 3.0], [0, 0, 0, 1, 1]),
    ],
)
def test_encode_gives_these_codes(codec: Grid, values: list[float], codes: list[int]) -> None:
    encoded = codec.encode(torch.tensor(values))
    assert encoded.dtype == codec.dtype
    assert encoded.tolist() == codes


@pytest.mark.parametrize(
    ("codec", "codes", "values"),
    [
        (grid(4, 0.5), [-8, -1, 0, 7], [-4.0, -0.5, 0.0, 3.5]),
        (grid(4, 0.5, zero=3, signed=False), [0, 3, 15], [-1.5, 0.0, 6.0]),
        (grid(1, 0.25), [-1, 0], [-0.25, 0.0]),
        (grid(1, 0.25, midrise=True), [0, 1], [-0.25, 0.25]),
        (grid(2, 0.5, midrise=True), [0, 1, 2, 3], [-1.5, -0.5, 0.5, 1.5]),
        (grid(3, 2.0, midrise=True), [0, 1, 2, 3, 4, 5, 6, 7], [-14.0, -10.0, -6.0, -2.0, 2.0, 6.0, 10.0, 14.0]),
    ],
)
def test_decode_gives_these_values(codec: Grid, codes: list[int], values: list[float]) -> None:
    decoded = codec.decode(torch.tensor(codes, dtype=codec.dtype))
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == values


def test_odd_integers_are_what_the_scale_multiplies() -> None:
    codes = torch.arange(4, dtype=torch.uint8)
    assert grid(2, 7.0, midrise=True).integers(codes).tolist() == [-3, -1, 1, 3]
    assert grid(1, 7.0, midrise=True).integers(codes[:2]).tolist() == [-1, 1]
    assert grid(2, 7.0, zero=2, signed=False).integers(codes).tolist() == [-2, -1, 0, 1]


def test_a_scale_along_an_axis_belongs_to_its_channel() -> None:
    codes = torch.tensor([[1, 2, 3], [1, 2, 3]], dtype=torch.int8)
    assert grid(4, [1.0, 10.0], axis=0).decode(codes).tolist() == [[1, 2, 3], [10, 20, 30]]
    assert grid(4, [1.0, 10.0, 100.0], axis=1).decode(codes).tolist() == [[1, 20, 300], [1, 20, 300]]
    shifted = grid(4, [1.0, 10.0], zero=[0, 1], axis=0)
    assert shifted.decode(codes).tolist() == [[1, 2, 3], [0, 10, 20]]
    assert shifted.encode(torch.tensor([[1.0, 2.0, 3.0], [0.0, 10.0, 20.0]])).equal(codes)


@pytest.mark.parametrize("bits", BITS)
def test_odd_grids_are_symmetric_and_have_no_zero(bits: int) -> None:
    codec = grid(bits, 0.3, midrise=True)
    values = codec.decode(every_code(codec))
    assert values.equal(-values.flip(0))
    assert bool((values != 0).all())


@pytest.mark.parametrize("kind", ["signed", "unsigned", "midrise"])
@pytest.mark.parametrize("bits", BITS)
@given(scale=SCALES, zero=st.integers(0, 255))
def test_every_code_of_one_grid_survives(bits: int, kind: str, scale: float, zero: int) -> None:
    codec = grid(bits, scale, signed=kind == "signed", midrise=kind == "midrise")
    if kind != "midrise":
        codec = grid(bits, scale, zero=codec.lowest + zero % 2**bits, signed=kind == "signed")
    codes = every_code(codec)
    assert codec.encode(codec.decode(codes)).equal(codes)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "midrise"])
@given(bits=st.sampled_from(BITS), scales=st.lists(SCALES, min_size=1, max_size=5), zero=st.integers(0, 255))
def test_every_code_of_grids_along_an_axis_survives(
    axis: int, kind: str, bits: int, scales: list[float], zero: int
) -> None:
    signed, midrise = kind == "signed", kind == "midrise"
    lowest = grid(bits, signed=signed).lowest
    zeros = [0 if midrise else lowest + (zero + channel) % 2**bits for channel in range(len(scales))]
    codec = grid(bits, scales, zero=zeros, signed=signed, axis=axis, midrise=midrise)
    codes = every_code(codec).expand(len(scales), 1, 2**bits).movedim(0, axis).contiguous()
    assert codec.encode(codec.decode(codes)).equal(codes)


@given(bits=st.sampled_from(BITS), scale=SCALES, midrise=st.booleans(), at=st.floats(-2, 2))
def test_encode_takes_the_nearest_level(bits: int, scale: float, midrise: bool, at: float) -> None:
    codec = grid(bits, scale, midrise=midrise)
    x = torch.tensor([at * scale * 2**bits])
    levels = codec.decode(every_code(codec)).double()
    chosen = (codec.decode(codec.encode(x)).double() - x).abs()
    # Float32 rounds x / scale and the levels, by up to 2**-24 of a number below 2**10 steps: 1e-4 of a step is ample.
    assert float(chosen) <= float((levels - x).abs().min()) + 1e-4 * scale


# --- vectors and palettes ------------------------------------------------------------------------------------------


def test_a_vector_is_neighbouring_channels_at_one_position() -> None:
    weight = torch.arange(12).reshape(2, 3, 1, 2)
    assert to_vectors(weight, 2).tolist() == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    # A block after the other where there are more channels, and zeros where the last one is short.
    assert to_vectors(torch.arange(6).reshape(3, 2), 2).tolist() == [[0, 2], [1, 3], [4, 0], [5, 0]]
    assert to_vectors(torch.arange(6).reshape(3, 2), 1).tolist() == [[0], [1], [2], [3], [4], [5]]


@given(
    channels=st.integers(1, 9),
    rest=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    dim=st.integers(1, 5),
)
def test_from_vectors_undoes_to_vectors(channels: int, rest: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(channels, *rest, generator=torch.Generator().manual_seed(0))
    vectors = to_vectors(weight, dim)
    assert vectors.shape == (-(-channels // dim) * weight[0].numel(), dim)
    assert from_vectors(vectors, tuple(weight.shape)).equal(weight)
    assert vectors.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize(
    ("palette", "codes", "values"),
    [
        (
            Palette(torch.tensor([[[-3], [1], [2], [5]]], dtype=torch.int8), torch.tensor([0.5, 2.0]), 2, (2, 2), 0),
            [[0, 1, 2, 3]],
            [[-1.5, 0.5], [4.0, 10.0]],
        ),
        (
            Palette(torch.tensor([[[1, -1], [2, 4]]], dtype=torch.int8), torch.tensor([1.0, 10.0]), 1, (2, 3), 0),
            [[0, 1, 1]],
            [[1.0, 2.0, 2.0], [-10.0, 40.0, 40.0]],
        ),
        (  # three channels in blocks of two: the second value of the last vectors is dropped
            Palette(torch.tensor([[[1, -1], [2, 4]]], dtype=torch.int8), torch.tensor(0.5), 1, (3, 1)),
            [[0, 1]],
            [[0.5], [-0.5], [1.0]],
        ),
        (  # a table for every group of channels
            Palette(torch.tensor([[[0.25], [0.5]], [[3.0], [-3.0]]]), torch.tensor(1.0), 1, (4, 1)),
            [[0, 1], [1, 0]],
            [[0.25], [0.5], [-3.0], [3.0]],
        ),
    ],
)
def test_palettes_decode_to_these_values(palette: Palette, codes: list[list[int]], values: list[list[float]]) -> None:
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    decoded = palette.decode(given_codes)
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == values


@given(
    bits=st.integers(1, 8),
    dim=st.integers(1, 4),
    groups=st.integers(1, 3),
    scale=SCALES,
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_code_of_a_whole_number_palette_survives(
    bits: int, dim: int, groups: int, scale: float, per_channel: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * dim * 2, 2**bits, 1, 1)
    # Distinct rows: the first column is a permutation of the 256 values of int8.
    first = torch.stack([torch.randperm(256, generator=generator)[: 2**bits] - 128 for _ in range(groups)])
    rest = torch.randint(-128, 128, (groups, 2**bits, dim - 1), generator=generator)
    lut = torch.cat([first.unsqueeze(-1), rest], dim=2).to(torch.int8)
    steps = scale * (1 + torch.rand(shape[0], generator=generator)) if per_channel else torch.tensor(scale)
    palette = Palette(lut, steps, bits, shape, 0 if per_channel else None)
    codes = torch.arange(2**bits).repeat(groups, 2).to(torch.uint8)
    assert palette.encode(palette.decode(codes)).equal(codes)


@pytest.mark.parametrize("gap", [1e-4, 1e-6])
def test_close_centroids_are_told_apart(gap: float) -> None:
    # 1e-6 is eight units in the last place at 1: two centroids that float32 itself tells apart.
    palette = Palette(torch.tensor([[[1.0], [1.0 + gap], [2.0], [3.0]]]), torch.tensor(1.0), 2, (40, 1))
    codes = torch.arange(40).remainder(4).reshape(1, -1).to(torch.uint8)
    assert palette.encode(palette.decode(codes)).equal(codes)


@pytest.mark.parametrize(("channels", "dim"), [(3, 2), (5, 4), (1, 3)])
def test_a_short_last_block_keeps_its_values(channels: int, dim: int) -> None:
    # What a short block's vectors hold beyond the weight is dropped, so its codes may change; the values must not.
    generator = torch.Generator().manual_seed(1)
    lut = torch.stack([torch.randperm(256, generator=generator)[:16] - 128 for _ in range(dim)], dim=1)
    palette = Palette(lut.unsqueeze(0).to(torch.int8), torch.tensor(0.5), 4, (channels, 16))
    codes = torch.arange(16).repeat(-(-channels // dim)).reshape(1, -1).to(torch.uint8)
    values = palette.decode(codes)
    assert palette.decode(palette.encode(values)).equal(values)


# --- coded tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coded", "expected"),
    [
        # ceil(9 * bits / 8), then 4 bytes a float32 scale and 1 byte a zero point that is used.
        (Coded(grid(8), torch.zeros(9, dtype=torch.int8)), 9 + 4),
        (Coded(grid(4), torch.zeros(3, 3, dtype=torch.int8)), 5 + 4),
        (Coded(grid(3), torch.zeros(3, 3, dtype=torch.int8)), (2 + 3) + 4),
        (Coded(grid(2, midrise=True), torch.zeros(3, 3, dtype=torch.uint8)), 3 + 4),
        (Coded(grid(1, [1.0] * 3, midrise=True, axis=0), torch.zeros(3, 3, dtype=torch.uint8)), 2 + 3 * 4),
        (
            Coded(grid(4, [1.0] * 3, zero=[0, 0, 7], signed=False, axis=0), torch.zeros(3, 3, dtype=torch.uint8)),
            5 + 3 * 4 + 3,
        ),
        # The table counts too: 2**bits * dim entries, 1 byte each as int8, 4 as float32.
        (
            Coded(
                Palette(torch.zeros(1, 4, 2, dtype=torch.int8), torch.ones(4), 2, (4, 9), 0),
                torch.zeros(1, 18, dtype=torch.uint8),
            ),
            5 + 4 * 4 + 8,
        ),
        (
            Coded(Palette(torch.zeros(2, 2, 1), torch.tensor(1.0), 1, (2, 9)), torch.zeros(2, 9, dtype=torch.uint8)),
            3 + 4 + 16,
        ),
    ],
)
def test_payload_is_codes_scales_zero_points_and_table(coded: Coded, expected: int) -> None:
    assert coded.payload_bytes() == expected


def test_a_coded_tensor_is_its_codec_on_its_codes() -> None:
    coded = Coded(grid(4, 0.5), torch.tensor([[1, -2, 3]], dtype=torch.int8))
    assert coded.decode().tolist() == [[0.5, -1.0, 1.5]]
    assert coded.packed().tolist() == [0xE1, 0x03]
