"""A classifier and an external test set, on one thread."""

import pytest
import torch
from external_hospital import write_hospital


@pytest.fixture(scope="session")
def hospital(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write_hospital(tmp_path_factory.mktemp("hospital"))
    torch.set_num_threads(before)
