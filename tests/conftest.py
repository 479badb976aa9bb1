"""What all tests share: one thread, and the real models where there are some."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny


def pytest_addoption(parser):
    parser.addoption("--smollm2", metavar="GGUF", help="SmolLM2-135M-Instruct.Q4_1.gguf; `make demo` fetches one into .demo/")
    parser.addoption("--rwkv6", metavar="PTH", help="an RWKV6 of 256 tokens that was really trained, such as rwkv.cpp's test models")


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
