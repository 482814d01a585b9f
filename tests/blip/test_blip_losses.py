"""Losses, targets and negatives against plain float64 arithmetic written out in loops."""

import math

import pytest
import torch

from infogrowth.blip.losses import (
    class_loss,
    contrastive_loss,
    copies_of_row,
    language_loss,
    matching_loss,
    negative_weights,
    same_id_targets,
    sample_negatives,
    similarity_logits,
    unit,
)


def softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrastive_loss_is_the_cross_entropy_of_soft_targets():
    logits, momentum, alpha = 3 * random_rows(3, 5), 3 * random_rows(3, 5, seed=1), 0.4
    expected = 0.0
    for row in range(3):
        p, q = softmax(logits[row].tolist()), softmax(momentum[row].tolist())
        for column in range(5):
            target = alpha * q[column] + (1 - alpha) * (column == row)
            expected -= target * math.log(p[column]) / 3
    loss = contrastive_loss(logits, momentum, torch.eye(3, 5), alpha)
    assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_candidates_of_the_same_image_share_the_target():
    targets = same_id_targets(torch.tensor([7, 3]), torch.tensor([7, 3, 7, -100, 7]))
    third = 1 / 3
    expected = torch.tensor([[third, 0, third, 0, third], [0, 1, 0, 0, 0]])
    torch.testing.assert_close(targets, expected)


def test_hidden_copies_change_neither_loss_nor_gradient_of_the_others():
    ids, queued = torch.tensor([4, 9]), torch.tensor([9, 5, 4])
    hidden = copies_of_row(ids, torch.cat([ids, queued]))
    assert hidden.int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    logits = random_rows(2, 5).requires_grad_()
    momentum = random_rows(2, 5, seed=1)
    hard = torch.eye(2, 5, dtype=torch.float64)
    loss = contrastive_loss(logits, momentum, hard, 0.4, hidden)
    loss.backward()
    # The same rows with the copies taken out.
    kept = [[0, 1, 2, 3], [0, 1, 3, 4]]
    fewer, fewer_momentum, fewer_hard = (
        torch.stack([rows.detach()[row, columns] for row, columns in enumerate(kept)])
        for rows in (logits, momentum, hard)
    )
    fewer.requires_grad_()
    expected = contrastive_loss(fewer, fewer_momentum, fewer_hard, 0.4)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for row, columns in enumerate(kept):
        torch.testing.assert_close(logits.grad[row, columns], fewer.grad[row])
    assert not logits.grad[hidden].any()


def test_language_loss_smooths_over_all_words_and_skips_padding():
    logits, ids = random_rows(2, 4, 6), torch.tensor([[5, 2, 3, 0], [5, 4, 0, 0]])
    total, words = 0.0, 0
    for row in range(2):
        for position in range(3):
            target = ids[row, position + 1].item()
            if target == 0:
                continue
            p = softmax(logits[row, position].tolist())
            total -= 0.9 * math.log(p[target]) + 0.1 * sum(math.log(v) for v in p) / 6
            words += 1
    loss = language_loss(logits, ids, pad_token_id=0, smoothing=0.1)
    assert loss.item() == pytest.approx(total / words, abs=1e-9)


def test_matching_loss_counts_only_pairs_that_exist():
    logits = random_rows(6, 2)
    labels = [1, 1, 0, 0, 0, 0]
    each = [
        -math.log(softmax(row.tolist())[label]) for row, label in zip(logits, labels, strict=True)
    ]
    both = matching_loss(logits, torch.tensor([True, True]))
    assert both.item() == pytest.approx(sum(each) / 6)
    first_only = matching_loss(logits, torch.tensor([True, False]))
    assert first_only.item() == pytest.approx((each[0] + each[1] + each[2] + each[4]) / 4)
    none = matching_loss(logits, torch.tensor([False, False]))
    assert none.item() == pytest.approx((each[0] + each[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    with torch.autocast("cpu", dtype=dtype):
        features = unit(torch.randn(4, 8, dtype=dtype))
        logits = similarity_logits(features, features, torch.tensor(0.07))
        assert features.dtype == logits.dtype == torch.float32
        full = features.double() @ features.double().T / 0.07
        torch.testing.assert_close(logits.double(), full, atol=1e-5, rtol=1e-5)
        assert matching_loss(torch.randn(12, 2).to(dtype), torch.ones(4) > 0).dtype == torch.float32
        words = torch.randn(2, 5, 9).to(dtype)
        ids = torch.ones(2, 5, dtype=torch.int64)
        assert language_loss(words, ids, 0, 0.1).dtype == torch.float32


def test_negatives_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([[0.0, 0.2, 0.8], [0.5, 0.0, 0.5]]).repeat(20000, 1)
    drawn = sample_negatives(weights, torch.Generator().manual_seed(0)).view(-1, 2)
    first = torch.bincount(drawn[:, 0], minlength=3) / 20000
    second = torch.bincount(drawn[:, 1], minlength=3) / 20000
    # Five standard deviations of a share of 20000 draws are below 0.018.
    torch.testing.assert_close(first, torch.tensor([0.0, 0.2, 0.8]), atol=0.018, rtol=0)
    torch.testing.assert_close(second, torch.tensor([0.5, 0.0, 0.5]), atol=0.018, rtol=0)
    assert first[0] == 0 and second[1] == 0


def test_the_same_generator_draws_the_same_negatives_and_global_state_stays():
    weights = torch.rand(50, 50)
    state = torch.random.get_rng_state()
    one = sample_negatives(weights, torch.Generator().manual_seed(3))
    assert torch.equal(one, sample_negatives(weights, torch.Generator().manual_seed(3)))
    assert not torch.equal(one, sample_negatives(weights, torch.Generator().manual_seed(4)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_are_softmax_plus_floor_without_the_forbidden():
    logits, forbidden = random_rows(3, 3), torch.eye(3, dtype=torch.bool)
    weights, _ = negative_weights(logits, forbidden, 1e-4)
    for row in range(3):
        expected = [p + 1e-4 for p in softmax(logits[row].tolist())]
        expected[row] = 0.0
        assert weights[row].tolist() == pytest.approx(expected)


def test_rows_without_any_negative_are_reported_and_do_not_stop_the_draw():
    forbidden = torch.tensor([[True, True], [True, False]])
    weights, has_negative = negative_weights(torch.zeros(2, 2), forbidden)
    assert has_negative.tolist() == [False, True]
    assert sample_negatives(weights, torch.Generator().manual_seed(0))[1] == 1


def test_weights_that_underflowed_fall_back_to_the_allowed_ones():
    # At temperature 0.001 softmax of a far candidate is exactly 0 in float32.
    logits = torch.tensor([[1000.0, -1000.0, -1000.0]])
    forbidden = torch.tensor([[True, False, False]])
    assert logits.softmax(1)[0, 1:].sum() == 0
    weights, has_negative = negative_weights(logits, forbidden)
    assert weights.tolist() == [[0.0, 1.0, 1.0]] and has_negative.tolist() == [True]


def test_class_loss_is_the_cross_entropy_of_cosines_to_the_class_vectors():
    images, texts = random_rows(2, 4), random_rows(4, 4, seed=1)
    vectors, classes, temperature = random_rows(3, 4, seed=2), [2, 0], 0.1

    def cosine(one, other):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.hypot(*one) / math.hypot(*other)

    def mean(rows):
        total = 0.0
        for number, row in enumerate(rows.tolist()):
            p = softmax([cosine(row, vector) / temperature for vector in vectors.tolist()])
            total -= math.log(p[classes[number % 2]])
        return total / len(rows)

    loss = class_loss(unit(images), unit(texts), vectors, torch.tensor(classes), temperature)
    assert loss.item() == pytest.approx((mean(images) + mean(texts)) / 2, abs=1e-7)
