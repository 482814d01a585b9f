"""Number formats of the forward pass."""

import pytest
import torch

from infogrowth.training.options import Precision


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_only_where_the_gpu_computes_in_it(monkeypatch, native, chosen):
    """torch emulates bfloat16 before Ampere, slower than float32, and counts that as support."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert Precision("auto", torch.device("cuda", 0)).name == chosen
    assert Precision("auto", torch.device("cpu")).name == "fp32"
