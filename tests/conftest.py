"""Fixtures of all tests: tiny random bases made from configs. Nothing here reaches a network.

Every test has `ICAE_HOME` in a temporary folder, but those marked `real`: they run on the embedded model, in the user's own cache.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported: a test that asks the Hub fails at once

import pytest
import tiny
import torch

from icae.base import Base, load_base
from icae.terminal import lent

_HOME = os.environ.get("ICAE_HOME")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes that tests start


def _set_home(home: str | None) -> None:
    if home is None:
        os.environ.pop("ICAE_HOME", None)
    else:
        os.environ["ICAE_HOME"] = home


@pytest.fixture(scope="session", autouse=True)
def temporary_home(tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    _set_home(home)
    yield home
    _set_home(_HOME)


@pytest.fixture(autouse=True)
def home_of_this_test(request, temporary_home):
    _set_home(_HOME if request.node.get_closest_marker("real") else temporary_home)
    yield
    _set_home(temporary_home)


@pytest.fixture(autouse=True)
def nothing_stays_lent():
    """Commands that a test runs without cli.main leave torch as it was."""
    yield
    lent.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own, empty."""
    monkeypatch.setenv("ICAE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as a model folder."""
    return tiny.save_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def base(base_folder) -> Base:
    return load_base(str(base_folder))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory) -> Base:
    """The same architecture with other weights."""
    return load_base(str(tiny.save_base(tmp_path_factory.mktemp("base") / "other-llama", seed=1)))


@pytest.fixture(scope="session", params=list(tiny.FAMILIES))
def family_base(request, tmp_path_factory) -> Base:
    return load_base(str(tiny.save_base(tmp_path_factory.mktemp("families") / request.param, request.param)))


@pytest.fixture(scope="session")
def real_base() -> Base:
    """The embedded model, for tests marked `real`."""
    _set_home(_HOME)
    return load_base()


@pytest.fixture(params=["kv", "embedding"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=["spread", "appended"])
def layout(request) -> str:
    return request.param
