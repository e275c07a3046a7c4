"""What the tests of a CLIP in use share: a small bundle, on one thread."""

import pytest
import torch
from clip_bundles import clip_bundle

from raymed.bundle import Bundle
from raymed.tasks.embedder import Embedder


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return clip_bundle()


@pytest.fixture(scope="module")
def embedder(bundle, one_thread) -> Embedder:
    return Embedder.from_bundle(bundle)
