"""Half precision changes speed and nothing else; memory that is short costs time, not the run."""

import io
import pickle

import pytest
import torch
from torch import nn

from infogrowth.encoders.dataset import Pairs, decoded_batches
from infogrowth.encoders.embedding import threads_for, workers_for
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.encoders.models import DualEncoder, half_products, halving
from infogrowth.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("folder", ["clip_folder", "siglip_folder"])
def test_half_weights_give_the_bits_that_autocast_gives(folder, request, pil_images):
    from transformers import AutoModel

    path = request.getfixturevalue(folder)
    exact, fast = (AutoModel.from_pretrained(path).float().eval() for _ in range(2))
    half_products(fast)
    assert {p.dtype for p in fast.parameters()} == {torch.float16, torch.float32}
    encoder = load_encoder(str(path))
    stack = torch.stack([encoder.preprocess(image) for image in pil_images])
    tokens = encoder.tokenize(["a red cat", "sea"])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
        for compute in (
            lambda model: model.get_image_features(pixel_values=stack).pooler_output,
            lambda model: model.get_text_features(**tokens).pooler_output,
        ):
            assert torch.equal(compute(exact), compute(fast))


def test_a_batch_that_overflows_in_half_precision_is_computed_again():
    class Encoder(DualEncoder):
        def image_features(self, model, images_BCHW):
            return model(images_BCHW)

        text_features = image_features

    exact = nn.Linear(3, 2)
    encoder = Encoder(exact, CPU)
    encoder._fast = lambda rows: torch.full((len(rows), 2), torch.inf)  # what float16 would give
    rows = torch.randn(4, 3)
    expected = nn.functional.normalize(exact(rows), dim=-1)
    torch.testing.assert_close(encoder.encode_images(rows), expected)


def test_a_batch_for_which_memory_is_short_is_computed_by_halves():
    sizes = []

    def compute(items):
        if len(items) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(items))
        return [item * 10 for item in items]

    assert halving(compute, list(range(8))) == [item * 10 for item in range(8)]
    assert sizes == [2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        halving(lambda _: compute([0] * 9), [1, 2])


def test_a_captioner_is_the_same_one_on_a_cpu_and_on_a_gpu(git_folder, monkeypatch):
    """A GPU rounds the weights to bfloat16 (here without a GPU): still the same fingerprint, so
    that recaptions begun on the one go on on the other."""
    on_cpu = load_captioner(str(git_folder)).fingerprint

    def to_bfloat16(module, *_, **__):
        return module._apply(lambda t: t.bfloat16() if t.is_floating_point() else t)

    monkeypatch.setattr(nn.Module, "to", to_bfloat16)
    captioner = load_captioner(str(git_folder), "cuda")
    assert next(captioner._model.parameters()).dtype == torch.bfloat16
    assert captioner.fingerprint == on_cpu


def test_a_tokenizer_travels_to_worker_processes(blip_folder, captions):
    tokenize = load_encoder(str(blip_folder)).tokenize
    copied = pickle.loads(pickle.dumps(tokenize))
    for name, tensor in tokenize(captions).items():
        assert torch.equal(copied(captions)[name], tensor)


def test_decoding_workers_are_a_ranks_share_of_its_own_node(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(128)))
    for name, value in {"RANK": "9", "MASTER_ADDR": "x", "WORLD_SIZE": "32"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # four nodes of eight
    assert workers_for(cuda) == 15
    assert workers_for(CPU) == 0
    assert threads_for(cuda) == 2


ENTRIES = [("0", "a cat", None), ("1", "a cat", None)]


class Unreadable:
    """A store that is gone."""

    def find(self, name):
        raise UserError(f"cannot read the LMDB x (row {name})")


def test_an_error_in_a_decoding_worker_is_one_sentence(blip_folder):
    preprocess = load_encoder(str(blip_folder)).preprocess
    table = Pairs(ENTRIES, Unreadable())
    for workers in (0, 1):
        batches = decoded_batches(table, preprocess, None, [(0, range(2))], 2, workers)
        with pytest.raises(UserError) as raised:
            next(batches)
        assert str(raised.value) == "cannot read the LMDB x (row 0)"


def test_full_shared_memory_is_one_sentence_of_the_worker(blip_folder, pil_images, monkeypatch):
    class Images:
        def find(self, name):
            buffer = io.BytesIO()
            pil_images[int(name)].save(buffer, "PNG")
            return buffer.getvalue()

    monkeypatch.setattr("shutil.disk_usage", lambda _: (64 << 20, 64 << 20, 0))
    preprocess = load_encoder(str(blip_folder)).preprocess
    table = Pairs(ENTRIES, Images())
    with pytest.raises(UserError, match="shm"):
        next(decoded_batches(table, preprocess, None, [(0, range(2))], 2, workers=1))
    assert len(next(decoded_batches(table, preprocess, None, [(0, range(2))], 2, 0)).rows) == 2
