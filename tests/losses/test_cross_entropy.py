"""CrossEntropyLoss against its formula."""

import torch
import torch.nn.functional as F

from raymed.losses import CrossEntropyLoss


def test_equals_the_formula(batch):
    logits, targets = batch
    p = logits.sigmoid()
    for weight in (None, 0.4, 3.0):
        expected = -((weight or 1) * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
        torch.testing.assert_close(CrossEntropyLoss(pos_weight=weight)(logits, targets), expected, rtol=1e-12, atol=0)


def test_default_is_torch_binary_cross_entropy(batch):
    assert torch.equal(CrossEntropyLoss()(*batch), F.binary_cross_entropy_with_logits(*batch))
