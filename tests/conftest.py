"""What all tests share: one thread, and the real models where there are some."""

from pathlib import Path

import pytest
import torch

from bone_ds.launch import Ranks

torch.set_num_threads(1)  # the models are tiny

SHARE_RUNS = ("test_zero", "test_resume")
"""Files that look at the same runs, the longest of all."""


def pytest_collection_modifyitems(items):
    """The longest come first."""
    items.sort(key=lambda item: item.path.stem not in SHARE_RUNS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take whole files, so that what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "runs" if Path(file).stem in SHARE_RUNS else file

    return WholeFiles(config, log)


def pytest_addoption(parser):
    parser.addoption("--smollm2", metavar="GGUF", help="SmolLM2-135M-Instruct.Q4_1.gguf; `make demo` fetches one into .demo/")
    parser.addoption("--rwkv6", metavar="PTH", help="an RWKV6 of 256 tokens that was really trained, such as rwkv.cpp's test models")


@pytest.fixture
def alone(monkeypatch) -> Ranks:
    """This process as the one rank of a run."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    return Ranks(0, 0, 1, 1)


@pytest.fixture(scope="session")
def smollm2_gguf(request) -> Path:
    given = request.config.getoption("--smollm2")
    fetched = sorted((Path(__file__).parents[1] / ".demo").glob("**/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if given:
        return Path(given)
    if not fetched:
        pytest.skip("no SmolLM2 here: run `make demo` once, or give --smollm2 PATH")
    return fetched[0]


@pytest.fixture(scope="session")
def real_rwkv6(request) -> Path:
    given = request.config.getoption("--rwkv6")
    if not given:
        pytest.skip("no trained RWKV6 is named: give --rwkv6 PATH")
    return Path(given)
