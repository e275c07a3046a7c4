"""The data set that all tests of training share, and one thread: they share the machine's cores too."""

import pytest
import torch
from small import load_data, recipe, write_images


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """The images' manifest."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def data(manifest):
    """The images as a data set."""
    return load_data(recipe(manifest))
