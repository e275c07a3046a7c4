"""A classifier whose weights are set by hand: the logit rises with the share of bright pixels and nothing else."""

import torch

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier

SIZE = 64


def bright_bundle() -> Bundle:
    """Channel 0 is silu(20 x - 14) of a pixel x all the way through; the logit is 24 times its mean, minus 5."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if "conv" in name or "shortcut.1" in name or "linear" in name or "stem.0" in name:
                parameter.zero_()
        network = encoder.net
        network.stem[0].weight[0, 0, 1, 1] = 20
        network.stem[1].bias[0] = -14
        for block in network.blocks[1:]:
            block.shortcut[1].weight[0, 0] = 1
        classifier.head.linear.weight[0, 0] = 24
        classifier.head.linear.bias[0] = -5
    return Bundle(
        kind="classifier",
        weights=dict(classifier.state_dict()),
        model={"encoder": to_dict(EncoderConfig())},
        preprocess=to_dict(Preprocess(size=SIZE, normalisation="none")),
        classes={"names": ["dark", "bright"], "positive": "bright"},
        operating_point={"threshold": 0.5},
    )
