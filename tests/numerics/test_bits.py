"""Bit packing against golden vectors (made by compressed-tensors 0.19), Python's big integers, and byte by byte."""

import pytest
import torch

from qtool.numerics.grids.bits import pack, pack_words, stack_runs, unpack, unpack_words

GOLDEN = [
    pytest.param(4, range(-8, 0), [0x76543210], id="int4-negative"),
    pytest.param(4, range(8), [0xFEDCBA98], id="int4-positive"),
    pytest.param(4, range(-5, 5), [0xA9876543, 0x000000CB], id="int4-ten-columns"),
    pytest.param(8, [-128, 0, 1, 127], [0xFF818000], id="int8"),
    pytest.param(3, [*range(-4, 4)] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], id="int3-across-words"),
]


def fields_of(values, bits):
    return torch.tensor([[v + (1 << (bits - 1)) for v in values]], dtype=torch.uint8)


@pytest.mark.parametrize(("bits", "values", "words"), GOLDEN)
def test_golden_words(bits, values, words):
    packed = pack_words(fields_of(values, bits), bits)
    assert packed.dtype == torch.int32
    assert [w & 0xFFFFFFFF for w in packed[0].tolist()] == words
    assert torch.equal(unpack_words(packed, bits, len(values)), fields_of(values, bits))


def test_golden_zero_points_are_packed_along_rows():
    zero = torch.tensor([[-8, 0], [-7, 1], [3, 2], [7, -1], [0, 0], [1, 1], [2, 2], [4, 4]])
    packed = pack_words((zero.T + 8).to(torch.uint8), 4).T
    assert [[w & 0xFFFFFFFF for w in row] for row in packed.tolist()] == [[0xCA98FB10, 0xCA987A98]]


@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_one_big_integer(bits, count):
    fields = torch.randint(
        0, 1 << bits, (3, 2, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    packed = pack(fields, bits)
    for row, packed_row in zip(fields.reshape(6, count).tolist(), packed.reshape(6, -1).tolist(), strict=True):
        stream = sum(field << (i * bits) for i, field in enumerate(row))
        assert bytes(packed_row) == stream.to_bytes((count * bits + 7) // 8, "little")
    assert torch.equal(unpack(packed, bits, count), fields)
    assert torch.equal(unpack_words(pack_words(fields, bits), bits, count), fields)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_transposed_columns(bits):
    """Zero points of whole rows: [N, 1], packed along N."""
    column = (torch.arange(8) % (1 << bits)).to(torch.uint8).reshape(8, 1)
    packed = pack_words(column.T, bits)
    assert torch.equal(packed, pack_words(column.T.clone(memory_format=torch.contiguous_format), bits))
    assert torch.equal(unpack_words(packed.T.contiguous().T, bits, 8).T, column)


def test_strided_input_is_packed_by_value():
    fields = torch.arange(64, dtype=torch.uint8).reshape(8, 8) % 16
    assert torch.equal(pack(fields.T, 4), pack(fields.T.contiguous(), 4))
    assert torch.equal(unpack(pack(fields, 4).T.contiguous().T, 4, 8), fields)


def test_one_column_of_words():
    words = pack_words(torch.arange(16, dtype=torch.uint8).reshape(2, 8), 4).repeat(1, 3)
    assert torch.equal(unpack_words(words[:, 1:2], 4, 8), torch.arange(16, dtype=torch.uint8).reshape(2, 8))


@pytest.mark.parametrize("width", [4, 8, 16, 32])
@pytest.mark.parametrize("places", [(1,), (1, 16), (81, 27, 9, 3, 1)], ids=len)
def test_runs_are_stacked_byte_by_byte(places, width):
    generator = torch.Generator().manual_seed(width)
    q = torch.randint(0, 256, (7, 2 * width * len(places)), dtype=torch.uint8, generator=generator)
    table = torch.randperm(256, generator=generator).to(torch.uint8)
    field, flip = (3, 15 if len(places) == 2 else 1), 0b1010
    blocks = torch.full((7, 2 * width + 3), 99, dtype=torch.uint8)
    stack_runs(q, places, width, table=table, field=field, flip=flip, out=blocks[:, 3:])
    for row, packed in zip(q.tolist(), blocks.tolist(), strict=True):
        assert packed[:3] == [99] * 3
        for i, byte in enumerate(packed[3:]):
            first = i // width * width * len(places) + i % width
            fields = [row[first + k * width] >> field[0] & field[1] for k in range(len(places))]
            assert byte == table[sum(f * p for f, p in zip(fields, places, strict=True)) ^ flip]


@pytest.mark.parametrize("width", [4, 8])
def test_half_bytes_with_signs(width):
    q = torch.arange(2 * width).to(torch.uint8).remainder(15).view(1, -1)
    packed = stack_runs(q, (1, 16), width, signed=True)
    for i, byte in enumerate(packed[0].tolist()):
        for number, half in ((int(q[0, i]) - 7, byte & 15), (int(q[0, i + width]) - 7, byte >> 4)):
            assert half & 7 == abs(number)
            assert half >> 3 == (number < 0)
