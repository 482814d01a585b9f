"""BLIP's tokenizer: BERT's words, then [DEC] (opens a text to write) and [ENC] (to match)."""

import os
from pathlib import Path

import torch
from transformers import BertTokenizer, PreTrainedTokenizerBase

from infogrowth.blip.weights import download
from infogrowth.errors import UserError, refusing
from infogrowth.files import atomic_write

VOCABULARY_FILE = "vocab.txt"
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(vocabulary: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer with [DEC] as bos and [ENC] as ``enc_token_id``.

    Args:
        vocabulary: a ``vocab.txt``, a folder that holds one, or a name on the Hugging Face hub
            (``bert-base-uncased``, whose [DEC] and [ENC] become BLIP's 30522 and 30523).

    Raises:
        UserError: no such file, a file without BERT's special tokens, or no network for a name.
    """
    tokenizer = BertTokenizer(vocab=_read_vocabulary(_vocabulary_path(vocabulary)))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
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
    """Write ``vocab.txt`` (without [DEC] and [ENC], which loading appends) into ``directory``."""
    appended = {tokenizer.bos_token_id, tokenizer.enc_token_id}
    words = sorted(
        (index, word) for word, index in tokenizer.get_vocab().items() if index not in appended
    )
    with atomic_write(Path(directory) / VOCABULARY_FILE, "w") as file:
        file.write("".join(f"{word}\n" for _, word in words))


def _vocabulary_path(vocabulary: str | os.PathLike[str]) -> Path:
    path = Path(vocabulary)
    if path.is_dir():
        path = path / VOCABULARY_FILE
    if path.is_file() or path.suffix == ".txt" or path.is_absolute():
        return path
    return download(str(vocabulary), VOCABULARY_FILE)


def _read_vocabulary(path: Path) -> dict[str, int]:
    with refusing(path, "the vocabulary", UnicodeDecodeError):
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words)}
    # A folder of other people's may list the two that are appended here; their order is ours.
    vocabulary = {word: i for word, i in vocabulary.items() if word not in ("[DEC]", "[ENC]")}
    missing = [token for token in _BERT_SPECIALS if token not in vocabulary]
    if missing:
        raise UserError(f"{path} is not a BERT vocabulary: there is no {', '.join(missing)}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"the vocabulary {path} has repeated words or words after [DEC] or [ENC]")
    return vocabulary
