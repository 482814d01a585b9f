"""Train a small lower-case WordPiece vocabulary on the captions of an annotation file.

    python scripts/making/train_vocabulary.py --annotations FILE.json --size 2500 --output vocab.txt

The special tokens stand first, as in BERT's; [DEC] and [ENC] are appended when it is loaded.
"""

import sys
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from infogrowth.annotations import load_annotations
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.text import pre_caption
from infogrowth.files import atomic_write

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The captioner's prompt has to be writable in any vocabulary.
ALWAYS = "a picture of"


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Options of scripts/making/train_vocabulary.py."""

    annotations: str = option(help="annotation JSON whose captions are learned")
    output: str = option(help="vocab.txt to write")
    size: int = option(2500, "tokens, special ones included")


def write_vocabulary(config: VocabularyConfig) -> int:
    """Train a small lower-case WordPiece vocabulary on the captions of an annotation file."""
    captions = read_captions(config.annotations)
    tokens = train_vocabulary(captions, config.size)
    with atomic_write(config.output, "w") as file:
        file.write("".join(f"{token}\n" for token in tokens))
    print(f"{len(tokens)} tokens from {len(captions)} captions in {config.output}")
    return 0


def read_captions(annotations: str) -> list[str]:
    """Every caption of the file, as training sees it."""
    texts: list[str] = []
    for entry in load_annotations(annotations):
        caption = entry["caption"]
        texts += [caption] if isinstance(caption, str) else caption
    return [pre_caption(text) for text in texts]


def train_vocabulary(captions: list[str], size: int) -> list[str]:
    """The tokens in the order of their ids: the special ones, then the others alphabetically."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False
    )
    # Often enough that its three words become whole tokens.
    tokenizer.train_from_iterator([*sorted(captions), *[ALWAYS] * len(captions)], trainer)
    # The trainer's own order changes from run to run where frequencies are equal. (So may its
    # choice of the very last pieces; a model's vocabulary is therefore kept with the model.)
    return [*SPECIALS, *sorted(tokenizer.get_vocab().keys() - set(SPECIALS))]


if __name__ == "__main__":
    sys.exit(run_script(VocabularyConfig, write_vocabulary))
