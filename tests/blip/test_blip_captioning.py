"""Captions: batched equals one by one, deterministic, and the best that the model can find."""

import itertools

import pytest
import torch

from infogrowth.blip.model import BlipCaptioner
from infogrowth.blip.pretrained import load_weights


@pytest.fixture(scope="module")
def captioner(golden, golden_config):
    model = BlipCaptioner(golden_config)
    load_weights(model, golden / "pretrain_init.safetensors")
    return model.eval()


@pytest.fixture(scope="module")
def images(pretrain_golden):
    return pretrain_golden.values["images"][0]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_each_image_says_alone(captioner, images, golden_tokenizer, beams):
    together = captioner.caption(images, golden_tokenizer, prompt="a man ", beams=beams)
    alone = [
        captioner.caption(image[None], golden_tokenizer, prompt="a man ", beams=beams)[0]
        for image in images
    ]
    assert together == alone
    assert len(set(together)) > 1
    assert captioner.caption(images[:0], golden_tokenizer) == []


@torch.no_grad()
def next_word_scores(captioner, image, ids):
    tokens = captioner.visual_encoder(image[None])
    row = torch.tensor([ids])
    logits = captioner.text_decoder(
        input_ids=row, encoder_hidden_states=tokens, use_cache=False
    ).logits
    return logits[0, -1].log_softmax(0)


def test_greedy_takes_the_likeliest_word_each_time(captioner, images, golden_tokenizer):
    config = captioner.config
    for image in images[:2]:
        ids = [config.bos_token_id]
        while len(ids) < 9:
            scores = next_word_scores(captioner, image, ids)
            if len(ids) < 5:
                scores[config.sep_token_id] = -torch.inf
            word = scores.argmax().item()
            ids.append(word)
            if word == config.sep_token_id:
                break
        expected = golden_tokenizer.decode(ids[1:], skip_special_tokens=True).strip()
        mine = captioner.caption(
            image[None], golden_tokenizer, prompt="", beams=1, max_length=9, min_length=5
        )
        assert mine == [expected]


def test_wide_beams_find_the_best_caption_of_all(captioner, images, golden_tokenizer):
    """Two words after the opening: all 195² pairs can be scored one by one."""
    config, image = captioner.config, images[0]
    first = next_word_scores(captioner, image, [config.bos_token_id])
    best = (-torch.inf, None)
    for word in first.topk(40).indices.tolist():
        if word == config.sep_token_id:
            continue
        second = next_word_scores(captioner, image, [config.bos_token_id, word])
        second[config.sep_token_id] = -torch.inf
        score = first[word] + second.max()
        best = max(best, (score.item(), (word, second.argmax().item())))
    expected = golden_tokenizer.decode(list(best[1]), skip_special_tokens=True).strip()
    mine = captioner.caption(
        image[None], golden_tokenizer, prompt="", beams=40, max_length=3, min_length=3
    )
    assert mine == [expected]


def test_min_length_and_mode(captioner, images, golden_tokenizer):
    captioner.train()
    first = captioner.caption(images, golden_tokenizer, prompt="", max_length=12, min_length=12)
    assert captioner.training
    captioner.eval()
    again = captioner.caption(images, golden_tokenizer, prompt="", max_length=12, min_length=12)
    assert first == again
    assert all(itertools.chain(text for text in first))
