"""The loader of training and evaluation: errors, shared memory, and how workers start."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from infogrowth import distributed
from infogrowth.data.loading import open_loader
from infogrowth.errors import UserError


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, number):
        if number == 7:
            raise UserError("sample 7 is missing")
        return {"image": torch.full((3,), float(number)), "number": number, "caption": f"{number}"}


def read(batches, workers):
    return list(open_loader(Numbers(), batches, workers, torch.device("cpu")))


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_and_numbers_are_stacked_and_text_is_a_list(workers):
    (batch,) = read([[1, 2]], workers)
    assert batch["image"].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert batch["number"].tolist() == [1, 2] and batch["caption"] == ["1", "2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_raised_here_as_it_is(workers):
    with pytest.raises(UserError, match=r"^sample 7 is missing$"):
        read([[1, 7]], workers)


def test_a_full_shared_memory_is_one_sentence_not_a_run_that_waits(monkeypatch):
    full = SimpleNamespace(total=64 << 20, used=64 << 20, free=8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (full.total, full.used, full.free))
    with pytest.raises(UserError, match="--shm-size"):
        read([[1, 2]], workers=1)
    assert len(read([[1, 2]], workers=0)) == 1  # nothing is shared


def test_workers_of_one_process_are_forked_and_those_of_ranks_come_from_a_clean_process(
    monkeypatch,
):
    alone = open_loader(Numbers(), [[1]], 1, torch.device("cpu"))
    assert alone.multiprocessing_context is None
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    ranks = open_loader(Numbers(), [[1]], 1, torch.device("cpu"))
    assert ranks.multiprocessing_context.get_start_method() == "forkserver"
    (batch,) = ranks
    assert batch["number"].tolist() == [1]
