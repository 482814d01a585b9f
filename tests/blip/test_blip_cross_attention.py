"""Reading an image once for many texts gives what transformers' own cross-attention gives."""

import pytest
import torch

from infogrowth.blip.model import BlipDual
from infogrowth.blip.text import SharedCrossAttention, SharedImages


@pytest.fixture(scope="module")
def attention(golden_config):
    model = BlipDual(golden_config)
    return model.text_encoder.encoder.layer[1].crossattention.self.double()


@pytest.mark.parametrize("images, rows", [(3, [2, 0, 2, 1, 1]), (1, [0] * 5), (5, None)])
def test_shared_images_give_the_plain_attention_and_its_gradient(attention, images, rows):
    assert type(attention) is SharedCrossAttention
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(5, 4, 48, generator=generator, dtype=torch.float64)
    tokens = torch.randn(images, 17, 48, generator=generator, dtype=torch.float64)
    tokens.requires_grad_()
    index = None if rows is None else torch.tensor(rows)
    shared = attention(texts, encoder_hidden_states=SharedImages(tokens, index))[0]
    (gradient,) = torch.autograd.grad(shared.square().sum(), tokens)
    plain = attention(texts, encoder_hidden_states=tokens if index is None else tokens[index])[0]
    (expected,) = torch.autograd.grad(plain.square().sum(), tokens)
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(gradient, expected)


def test_dropout_is_applied_in_training_only(golden_config):
    model = BlipDual(golden_config.replace(text_dropout=0.5))
    attention = model.text_encoder.encoder.layer[0].crossattention.self
    texts, images = torch.randn(2, 4, 48), SharedImages(torch.randn(2, 17, 48), None)
    once = attention(texts, encoder_hidden_states=images)[0]
    assert not torch.equal(once, attention(texts, encoder_hidden_states=images)[0])
    attention.eval()
    once = attention(texts, encoder_hidden_states=images)[0]
    assert torch.equal(once, attention(texts, encoder_hidden_states=images)[0])
