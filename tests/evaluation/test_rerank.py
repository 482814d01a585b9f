"""Re-ranked scores against the paper's own (golden D) and against one pair at a time."""

import json
import os

import numpy as np
import pytest
import torch

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig, preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_weights
from infogrowth.blip.retrieval import BlipRetrieval
from infogrowth.blip.text import load_tokenizer, open_with, tokenize
from infogrowth.errors import UserError
from infogrowth.evaluation import retrieval
from infogrowth.evaluation.retrieval import recall_table


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return {"image": self.images[number]}


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads((golden / "retrieval_meta.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "retrieval_arrays.npz")


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden / "vocab.txt")


@pytest.fixture(scope="module")
def model(golden, tokenizer):
    config = BlipConfig(
        image_size=32, patch_size=8, vision_width=48, vision_depth=3, vision_heads=3,
        text_width=48, text_depth=3, text_heads=3, text_feedforward=96, text_positions=64,
        text_dropout=0.0, embed_dim=16,
    ).with_tokenizer(tokenizer)  # fmt: skip
    model = BlipRetrieval(config, queue_size=32)
    load_weights(model, golden / "retrieval_init.safetensors")
    return model


@pytest.fixture(scope="module")
def scored(model, tokenizer, arrays, meta):
    def score(k_test, batch_size=5, **options):
        return retrieval.retrieval_scores(
            model,
            tokenizer,
            Images(torch.from_numpy(arrays["eval_images"])),
            meta["eval"]["text"],
            k_test=k_test,
            batch_size=batch_size,
            **options,
        )

    return score


def test_cosines_are_the_golden_ones(scored, arrays):
    np.testing.assert_allclose(scored(8).cosine, arrays["eval_sims_matrix"], atol=2e-6)


@pytest.mark.parametrize("k_test", [8, 12])
def test_scores_and_recalls_are_the_golden_ones(scored, arrays, meta, k_test):
    scores = scored(k_test)
    expected_i2t = arrays[f"eval_k{k_test}_score_i2t"].copy()
    expected_t2i = arrays[f"eval_k{k_test}_score_t2i"]
    if k_test == 8:
        # Captions 5 and 20 are one text, on both sides of image 5's border: either may be taken.
        assert sorted(expected_i2t[5, [5, 20]])[0] == -100
        expected_i2t[5, [5, 20]] = sorted(expected_i2t[5, [5, 20]], reverse=True)
    np.testing.assert_allclose(scores.t2i, expected_t2i, atol=2e-5)
    np.testing.assert_allclose(scores.i2t, expected_i2t, atol=2e-5)
    img2txt = [meta["eval"]["img2txt"][str(i)] for i in range(12)]
    txt2img = [meta["eval"]["txt2img"][str(t)] for t in range(30)]
    table = recall_table(scores.i2t.numpy(), scores.t2i.numpy(), img2txt, txt2img)
    assert table == pytest.approx(meta[f"eval_k{k_test}_itm_eval"], abs=1e-9)


@pytest.mark.parametrize("k_test", [12, 30, 256])
def test_k_test_at_or_above_the_set_scores_every_pair(scored, k_test):
    scores = scored(k_test)
    assert (scores.t2i > -100).all()
    assert ((scores.i2t > -100).sum(dim=1) == min(k_test, 30)).all()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing_but_rounding(scored, batch_size):
    one, other = scored(8), scored(8, batch_size=batch_size)
    np.testing.assert_allclose(one.i2t, other.i2t, atol=2e-5)
    np.testing.assert_allclose(one.t2i, other.t2i, atol=2e-5)


def test_model_is_scored_without_dropout_and_left_in_its_mode(scored, model):
    model.train()
    in_training = scored(8)
    assert model.training
    model.eval()
    assert torch.equal(in_training.i2t, scored(8).i2t)


def test_workers_give_the_same_scores(scored):
    assert torch.equal(scored(8).t2i, scored(8, workers=2).t2i)


@pytest.mark.parametrize("world_size", [2, 5, 40])
def test_blocks_of_all_ranks_are_every_row_once(monkeypatch, world_size):
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    rows = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows += [number for block in retrieval.own_blocks(23, 4) for number in block]
    assert sorted(rows) == list(range(23))


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_scores_are_the_same_bits_at_any_world_size(monkeypatch, scored, world_size):
    """Ranks one after the other in one process; what they gather is what the others had."""
    alone = scored(8)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    # Each gather is a meeting point: a first round records what every rank brings to the first
    # one, the next round gets that far, and so on until no rank needs a recording.
    brought: list[list[torch.Tensor]] = []
    while True:
        meeting: list[torch.Tensor] = []
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            replay = iter(brought)

            def gather(tensor, replay=replay, meeting=meeting):
                known = next(replay, None)
                if known is None:
                    meeting.append(tensor)
                    raise StopAsyncIteration
                return known

            monkeypatch.setattr(distributed, "all_gather_ragged", gather)
            try:
                scores = scored(8)
            except StopAsyncIteration:
                continue
            assert torch.equal(scores.i2t, alone.i2t)
            assert torch.equal(scores.t2i, alone.t2i)
        if not meeting:
            break
        brought.append(meeting)
    assert len(brought) >= 4


def test_one_image_against_many_texts_is_the_pair_by_pair_score(tokenizer):
    config = preset("tiny", image_size=32).with_tokenizer(tokenizer)
    model = BlipDual(config, seed=3).eval()
    texts = ["a dog", "two dogs on a red boat under the sky", "", "snow", "a dog " * 40]
    ids, mask = tokenize(tokenizer, texts, 35)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens, _ = model.encode_image(image)
        fast = model.itm_logits(tokens, ids, mask, torch.zeros(len(texts), dtype=torch.int64))
        for row in range(len(texts)):  # transformers' own way: each text reads the image itself
            states = model.text_encoder(
                input_ids=open_with(ids[[row]], config.enc_token_id),
                attention_mask=mask[[row]],
                encoder_hidden_states=tokens,
            ).last_hidden_state
            assert states.shape == (1, 35, config.text_width)
            np.testing.assert_allclose(fast[row], model.itm_head(states[0, 0]), atol=2e-6)
    assert fast.std() > 1e-3  # not all the same number


def test_candidates_and_cosines_do_not_depend_on_autocast(scored, monkeypatch):
    """In bfloat16, cosines of thousands of captions would collapse to a few hundred values."""
    features = []
    encode_image, encode_text = BlipDual.encode_image, BlipDual.encode_text

    def watch(encode):
        def watched(*inputs):
            found = encode(*inputs)
            features.append(found[1])
            return found

        return watched

    monkeypatch.setattr(BlipDual, "encode_image", watch(encode_image))
    monkeypatch.setattr(BlipDual, "encode_text", watch(encode_text))
    scores = scored(8, batch_size=64, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    texts, images = features
    assert scores.cosine.dtype == torch.float32
    assert torch.equal(scores.cosine, images @ texts.T)
    ranked = scores.i2t > retrieval.NOT_RANKED
    assert torch.equal(ranked, retrieval.top_candidates(images @ texts.T, 8))


def test_a_batch_from_a_worker_is_one_open_file_not_one_per_image(scored, monkeypatch):
    encode_image = BlipDual.encode_image

    def open_files(batch_size):
        found = []

        def watched(*inputs):
            found.append(len(os.listdir("/proc/self/fd")))
            return encode_image(*inputs)

        monkeypatch.setattr(BlipDual, "encode_image", watched)
        scored(8, batch_size=batch_size, workers=1)
        return found[0]

    assert open_files(12) == open_files(2)


def test_passes_keep_within_the_budget_and_miss_no_text():
    lengths = sorted(np.random.default_rng(0).integers(2, 35, 200).tolist())
    runs = retrieval.passes(lengths, 128)
    assert [i for run in runs for i in range(200)[run]] == list(range(200))
    assert all((run.stop - run.start) * lengths[run.stop - 1] <= 128 for run in runs)
    assert retrieval.passes([50], 10) == [slice(0, 1)] and retrieval.passes([], 10) == []


def test_candidates_at_a_tied_border_are_the_lower_indices():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert retrieval.top_candidates(scores, 2).nonzero().tolist() == [
        [0, 1],
        [0, 2],
        [1, 0],
        [1, 1],
    ]
    assert retrieval.top_candidates(scores, 9).all()


def test_an_image_that_cannot_be_read_is_named(model, tokenizer):
    class Broken(Images):
        def __getitem__(self, number):
            raise UserError("the key '000007' is not in the LMDB x")

    with pytest.raises(UserError, match=r"^the key '000007' is not in the LMDB x$"):
        retrieval.retrieval_scores(model, tokenizer, Broken([0, 1]), ["a"], workers=1)


def test_empty_evaluation_set_is_an_error(model, tokenizer):
    with pytest.raises(UserError, match="no images"):
        retrieval.retrieval_scores(model, tokenizer, Images([]), [])
