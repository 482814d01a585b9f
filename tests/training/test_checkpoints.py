"""Checkpoints: whole or not there, the pointer never broken, nothing executed on loading."""

import gc
import os
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_weights
from infogrowth.errors import UserError
from infogrowth.training import checkpoints
from infogrowth.training.checkpoints import find, latest, load_checkpoint, save


def saved(directory, step=3, keep=2):
    """The path of the checkpoint of a run after so many steps."""
    content = {"progress": {"step": step}, "model": {"weight": torch.arange(3.0)}}
    state = SimpleNamespace(
        state_dict=lambda: content,
        progress=SimpleNamespace(step=step),
        config=SimpleNamespace(keep_checkpoints=keep),
        checkpoints=directory,
    )
    save(state)
    return latest(directory)


def test_the_last_n_are_kept_and_latest_names_the_newest(tmp_path):
    for step in (1, 5, 9, 100):
        assert saved(tmp_path, step).name == f"step_{step:08d}.pth"
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "step_00000009.pth",
        "step_00000100.pth",
    ]
    assert torch.equal(load_checkpoint(latest(tmp_path))["model"]["weight"], torch.arange(3.0))


@pytest.mark.parametrize("killed_at", range(8))
def test_killed_at_any_system_call_the_latest_checkpoint_loads(tmp_path, monkeypatch, killed_at):
    """A kill is an exception that nothing cleans up after: here every call to the disk in turn."""

    class Killed(BaseException):
        pass

    saved(tmp_path, 1, keep=1)
    calls = []

    def dying(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) > killed_at:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(torch, "save", dying(torch.save))
        try:
            saved(tmp_path, 2, keep=1)
            finished = True
        except Killed:
            finished = False
    assert load_checkpoint(latest(tmp_path))["progress"]["step"] in ((2,) if finished else (1, 2))
    assert find(tmp_path, "auto") == latest(tmp_path)
    assert not list(tmp_path.glob("*.tmp-*"))  # leftovers go when a run starts


def test_resume_auto_without_checkpoints_starts_anew(tmp_path):
    assert find(tmp_path / "new", "auto") is None
    assert find(tmp_path / "new", "none") is None


def test_resume_none_does_not_throw_an_earlier_run_away(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="earlier run"):
        find(tmp_path, "none")


def test_resume_takes_a_file_a_checkpoint_folder_or_an_output_folder(tmp_path):
    path = saved(tmp_path / "run" / "checkpoints")
    for given in (path, path.parent, tmp_path / "run"):
        assert find(tmp_path / "other", str(given)) == path
    with pytest.raises(UserError, match="absent"):
        find(tmp_path, str(tmp_path / "absent.pth"))


def test_a_pointer_to_nothing_is_an_error(tmp_path):
    path = saved(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="gone"):
        find(tmp_path, "auto")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"model": {}}, tmp_path / "official.pth")
    with pytest.raises(UserError, match="--pretrained"):
        load_checkpoint(tmp_path / "official.pth")


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"format": 1, "progress": Evil()}))
    torch.save({"format": 1, "progress": Evil()}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_training_checkpoint_is_also_an_official_one(make_run):
    small = make_run(max_steps=1).train()
    model = BlipDual(small.model.config)
    report = load_weights(model, latest(small.state.checkpoints))
    assert not report.missing and not report.mismatched
    assert torch.equal(model.vision_proj.weight, small.model.vision_proj.weight)


def test_what_a_run_was_resumed_from_does_not_stay_in_memory(make_run, monkeypatch):
    make_run(max_steps=1).train()
    read = []

    def watched(path):
        content = load_checkpoint(path)
        read.extend(weakref.ref(tensor) for tensor in content["model"].values())
        return content

    monkeypatch.setattr(checkpoints, "load_checkpoint", watched)
    again = make_run(max_steps=2).resume()
    gc.collect()
    assert len(read) > 100 and not any(tensor() is not None for tensor in read)
    assert again.progress.step == 1
