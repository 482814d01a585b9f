"""What a training does with one batch: tokenise, move to the device, call the model."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.pretrain import PretrainLosses
from infogrowth.blip.retrieval import RetrievalLosses
from infogrowth.blip.tokenizer import tokenize
from infogrowth.training.loading import Batch


class _Inputs:
    """Images, token ids and mask, and one row of numbers, on the device.

    Args:
        longest: pad texts to the longest of the batch instead of ``max_length``: the same losses
            for less work, where nothing needs one shape in all batches (a compiler) or on all
            ranks (texts that are gathered).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        device: torch.device,
        longest: bool = True,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.device, self.longest = device, longest

    def on_device(self, batch: Batch, numbers: str) -> list[torch.Tensor]:
        ids_BT, mask_BT = tokenize(
            self.tokenizer, batch["caption"], self.max_length, longest=self.longest
        )
        inputs = (batch["image"], ids_BT, mask_BT, batch[numbers])
        return [tensor.to(self.device, non_blocking=True) for tensor in inputs]


class PretrainForward(_Inputs):
    """The pretraining losses of a batch of pairs."""

    def __call__(
        self, model: nn.Module, batch: Batch, alpha: float, generator: torch.Generator
    ) -> PretrainLosses:
        images, ids_BT, mask_BT, rows = self.on_device(batch, "index")
        return model(images, ids_BT, mask_BT, alpha, sample_ids=rows, generator=generator)


class RetrievalForward(_Inputs):
    """The retrieval losses of a batch of pairs, whose images have several captions."""

    def __call__(
        self, model: nn.Module, batch: Batch, alpha: float, generator: torch.Generator
    ) -> RetrievalLosses:
        images, ids_BT, mask_BT, image_ids = self.on_device(batch, "image_id")
        return model(images, ids_BT, mask_BT, image_ids, alpha, generator=generator)
