"""The text transformers: transformers' BLIP text encoder and decoder, and how they are tied."""

import torch
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.cross_attention import share_images


def text_config(config: BlipConfig) -> BlipTextConfig:
    """The same shape for ``transformers``; dropout is BLIP's, whose default differs from theirs."""
    built = BlipTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        encoder_hidden_size=config.vision_width,
        intermediate_size=config.text_feedforward,
        num_hidden_layers=config.text_depth,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.text_positions,
        layer_norm_eps=config.text_norm_eps,
        hidden_dropout_prob=config.text_dropout,
        attention_probs_dropout_prob=config.text_dropout,
        pad_token_id=config.pad_token_id,
        sep_token_id=config.sep_token_id,
        eos_token_id=config.sep_token_id,
        bos_token_id=config.bos_token_id,
    )
    built._attn_implementation = "eager"  # the only one that BLIP's text attention has
    return built


def build_text_encoder(config: BlipConfig, learn_padding: bool) -> BlipTextModel:
    """The text encoder; with image tokens given it reads them by cross-attention.

    Args:
        learn_padding: whether the [PAD] row of the word embeddings gets a gradient. In the paper's
            pretraining it does (its embeddings are resized, which forgets the padding row), in
            its retrieval it does not.
    """
    encoder = BlipTextModel(text_config(config), add_pooling_layer=False)
    share_images(encoder)
    if learn_padding:
        encoder.embeddings.word_embeddings.padding_idx = None
    return encoder


def build_text_decoder(config: BlipConfig, learn_padding: bool = True) -> BlipTextLMHeadModel:
    """The text decoder, whose output layer is its word embeddings."""
    decoder = BlipTextLMHeadModel(text_config(config))
    if learn_padding:
        decoder.bert.embeddings.word_embeddings.padding_idx = None
    tie_output_layer(decoder)
    return decoder


def tie_output_layer(decoder: BlipTextLMHeadModel) -> None:
    """Make the output layer's weight the word embeddings, and its two bias names one parameter."""
    predictions = decoder.cls.predictions
    predictions.decoder.weight = decoder.bert.embeddings.word_embeddings.weight
    predictions.decoder.bias = predictions.bias


def tie_decoder(encoder: BlipTextModel, decoder: BlipTextLMHeadModel) -> None:
    """Let the decoder use the encoder's own modules for all but self-attention (BLIP §3.2)."""
    decoder.bert.embeddings = encoder.embeddings
    for mine, theirs in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        mine.crossattention = theirs.crossattention
        mine.intermediate = theirs.intermediate
        mine.output = theirs.output
    tie_output_layer(decoder)


def open_with(ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """``ids (B, T)`` with the first token ([CLS]) replaced, as a new tensor."""
    first = torch.full_like(ids[:, :1], token_id)
    return torch.cat([first, ids[:, 1:]], dim=1)
