"""Text: BLIP's tokenizer, and its text encoder and decoder, which are those of transformers.

In the matching step every image meets several texts, and in re-ranking hundreds. Keys and values of
cross-attention depend on the image alone, so here they are computed per image and handed out per
text: the same numbers, and at ViT-B/16 nearly half the work of a matched pair less. The head reads
the first token only, so in the last layer only that one reads the image.

Shapes: G images, N texts, L image tokens, T text length, H heads, D channels of a head, W width.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import BertTokenizer, BlipTextConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip_text import (
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.weights import download
from infogrowth.errors import UserError, refusing
from infogrowth.files import atomic_write

VOCABULARY_FILE = "vocab.txt"
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_APPENDED = ("[DEC]", "[ENC]")  # opens a text to write, and one to match


def load_tokenizer(vocabulary: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer with [DEC] as bos and [ENC] as ``enc_token_id``.

    Args:
        vocabulary: a ``vocab.txt``, a folder that holds one, or a name on the Hugging Face hub
            (``bert-base-uncased``, whose [DEC] and [ENC] become BLIP's 30522 and 30523).

    Raises:
        UserError: no such file, a file without BERT's special tokens, or no network for a name.
    """
    path = Path(vocabulary)
    if path.is_dir():
        path = path / VOCABULARY_FILE
    if not (path.is_file() or path.suffix == ".txt" or path.is_absolute()):
        path = download(str(vocabulary), VOCABULARY_FILE)
    tokenizer = BertTokenizer(
        vocab=_read_vocabulary(path), bos_token="[DEC]", additional_special_tokens=["[ENC]"]
    )
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    max_length: int = 30,
    longest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both ``(B, T) int64``: [CLS] words [SEP], padded or truncated.

    Args:
        longest: pad to the longest caption at hand instead of ``max_length``: the same numbers
            for less work, but shapes then differ between batches and ranks.
    """
    batch = tokenizer(
        list(captions),
        padding="longest" if longest else "max_length",
        truncation=True,
        max_length=max_length,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]


def save_vocabulary(tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str]) -> None:
    """Write ``vocab.txt`` (without [DEC] and [ENC], which loading appends) into ``directory``, on
    rank 0."""
    if not distributed.is_main():
        return
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary.keys() - _APPENDED, key=vocabulary.get)  # type: ignore[arg-type]
    with atomic_write(Path(directory) / VOCABULARY_FILE, "w") as file:
        file.writelines(f"{word}\n" for word in words)


def _read_vocabulary(path: Path) -> dict[str, int]:
    with refusing(path, "the vocabulary", UnicodeDecodeError):
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words)}
    # A folder of other people's may list the two that are appended here; their order is ours.
    vocabulary = {word: i for word, i in vocabulary.items() if word not in _APPENDED}
    missing = [token for token in _BERT_SPECIALS if token not in vocabulary]
    if missing:
        raise UserError(f"{path} is not a BERT vocabulary: there is no {', '.join(missing)}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"the vocabulary {path} has repeated words or words after [DEC] or [ENC]")
    return vocabulary


class SharedImages(NamedTuple):
    """Images for N texts: text n reads image ``rows_N[n]``, or image n when there are no rows."""

    tokens_GLW: torch.Tensor
    rows_N: torch.Tensor | None


class SharedCrossAttention(BlipTextSelfAttention):
    """transformers' cross-attention, which also takes :class:`SharedImages` for image states."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | SharedImages | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(encoder_hidden_states, SharedImages):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, **options)
        tokens_GLW, rows_N = encoder_hidden_states
        queries = self.query(hidden_states)
        texts, length, width = queries.shape
        keys_GHLD = self._heads(self.key(tokens_GLW))
        values_GHLD = self._heads(self.value(tokens_GLW))
        if rows_N is not None and len(tokens_GLW) == 1:
            # Queries do not see each other, so all texts' can stand in one long row.
            queries = queries.reshape(1, texts * length, width)
        elif rows_N is not None:
            keys_GHLD, values_GHLD = keys_GHLD[rows_N], values_GHLD[rows_N]
        context = F.scaled_dot_product_attention(
            self._heads(queries),
            keys_GHLD,
            values_GHLD,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).reshape(texts, length, width), None

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """``(n, length, W)`` to ``(n, H, length, D)``."""
        split = states.unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        return split.transpose(1, 2)


class LastLayer(BlipTextLayer):
    """The encoder's last layer: where images are read, only the first token goes on to them."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | SharedImages | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if not isinstance(encoder_hidden_states, SharedImages):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        states_NTW, _ = self.attention(hidden_states, attention_mask)
        states_N1W, _ = self.crossattention(
            states_NTW[:, :1], encoder_hidden_states=encoder_hidden_states
        )
        return self.feed_forward_chunk(states_N1W)


def _text_config(config: BlipConfig) -> BlipTextConfig:
    built = BlipTextConfig(**config.text_options())
    built._attn_implementation = "eager"  # the only one that BLIP's text attention has
    return built


def build_text_encoder(config: BlipConfig) -> BlipTextModel:
    """The text encoder; with image tokens given it reads them by cross-attention."""
    encoder = BlipTextModel(_text_config(config), add_pooling_layer=False)
    layer: Any
    for index, layer in enumerate(encoder.encoder.layer):
        shared = SharedCrossAttention(encoder.config, True, layer_idx=index)
        shared.load_state_dict(layer.crossattention.self.state_dict())
        layer.crossattention.self = shared
    layer.__class__ = LastLayer
    return encoder


def build_text_decoder(
    config: BlipConfig, encoder: BlipTextModel | None = None
) -> BlipTextLMHeadModel:
    """The text decoder, whose output layer is its word embeddings.

    Args:
        encoder: whose own modules the decoder uses for all but self-attention (BLIP §3.2).
    """
    decoder = BlipTextLMHeadModel(_text_config(config))
    if encoder is not None:
        decoder.bert.embeddings = encoder.embeddings
        for mine, theirs in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
            mine.crossattention = theirs.crossattention
            mine.intermediate = theirs.intermediate
            mine.output = theirs.output
    predictions = decoder.cls.predictions
    predictions.decoder.weight = decoder.bert.embeddings.word_embeddings.weight
    predictions.decoder.bias = predictions.bias  # its two names are one parameter
    return decoder


def open_with(ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """``ids (B, T)`` with the first token ([CLS]) replaced, as a new tensor."""
    first = torch.full_like(ids[:, :1], token_id)
    return torch.cat([first, ids[:, 1:]], dim=1)


def attention_bias(mask_BT: torch.Tensor, dtype: torch.dtype, causal: bool = False) -> torch.Tensor:
    """What is added to attention scores: 0 for words and hugely negative for padding, ``(B, 1, 1,
    T)``, if ``causal`` for later words too, ``(B, 1, T, T)``.

    transformers would make it too, but only after reading from the device whether there is padding.
    """
    visible = (mask_BT != 0)[:, None, None]
    if causal:
        length = mask_BT.shape[1]
        visible = visible & visible.new_ones(length, length).tril()
    bias = torch.zeros(visible.shape, dtype=dtype, device=mask_BT.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)
