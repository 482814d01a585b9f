"""The feature queue against a queue written one column at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infogrowth.blip.momentum import write_queue
from infogrowth.blip.pretrain import BlipPretrain


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 21), min_size=1, max_size=6),
)
def test_any_size_takes_any_batch_as_if_written_one_by_one(size, batches):
    features, ids = torch.zeros(2, size), torch.full((1, size), -100)
    pointer = torch.zeros(1, dtype=torch.int64)
    expected, position, written = [-100] * size, 0, 0
    for count in batches:
        numbers = torch.arange(written, written + count)
        write_queue([features, ids], pointer, [numbers[:, None].repeat(1, 2), numbers[:, None]])
        for number in numbers.tolist():
            expected[position] = number
            position = (position + 1) % size
        written += count
        assert ids[0].tolist() == expected
        assert pointer.item() == position
        assert features[1].tolist() == [max(number, 0) for number in expected]


def test_an_empty_queue_is_left_alone():
    empty, pointer = torch.zeros(4, 0), torch.zeros(1, dtype=torch.int64)
    write_queue([empty], pointer, [torch.ones(3, 4)])
    assert pointer.item() == 0


def test_a_fresh_queue_holds_unit_columns(golden_config):
    queue = BlipPretrain(golden_config, queue_size=5).image_queue
    assert queue.norm(dim=0).tolist() == pytest.approx([1.0] * 5)
