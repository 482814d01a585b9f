"""Watching a training step from outside: what it computed and which negatives it drew."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from infogrowth.blip import momentum


def hardest(weights, generator=None):
    """The heaviest column of each row, the first among equals, as in the golden fixtures."""
    return weights.argmax(1)


def hardest_negatives():
    """Within it every step takes the hardest negatives instead of drawing them."""
    return mock.patch.object(momentum, "sample_negatives", hardest)


@contextmanager
def watched(model, draw=hardest):
    """What the model's next step computes: features, weights, negatives, matching logits …"""
    seen = SimpleNamespace()
    contrast, itm_logits = model.contrast, model.itm_logits
    drawn = []

    def watch_contrast(*inputs):
        seen.features = contrast(*inputs)
        return seen.features

    def watch_itm_logits(*inputs):
        seen.itm_logits = itm_logits(*inputs)
        return seen.itm_logits

    def watch_draw(weights, generator=None):
        drawn.append((weights, draw(weights, generator)))
        return drawn[-1][1]

    def watch_decoder(module, inputs, output):
        seen.lm_logits = output.logits.detach()

    decoder = getattr(model, "text_decoder", None)
    hook = decoder.register_forward_hook(watch_decoder) if decoder is not None else None
    with (
        mock.patch.object(model, "contrast", watch_contrast),
        mock.patch.object(model, "itm_logits", watch_itm_logits),
        mock.patch.object(momentum, "sample_negatives", watch_draw),
    ):
        yield seen
    if hook is not None:
        hook.remove()
    # The wrong images of all texts are drawn first, then the wrong texts.
    (seen.weights_image_for_text, seen.negative_image), *rest = drawn
    ((seen.weights_text_for_image, seen.negative_text),) = rest
