"""Fuzzing of all that reads what strangers wrote. The rule: no traceback, no hang, nothing lost in
silence. A test is given an `rng` for each of its cases, seeded by the number in its name:

    make fuzz CASES=1000                                              # of every kind of input
    CASES=1000 python -m pytest tests/fuzz/test_tables.py             # of one kind
    CASES=1000 python -m pytest tests/fuzz/test_tables.py -k '[17]'   # one case again
"""

import os
import random

import pytest

CASES = int(os.environ.get("CASES", 20))


def pytest_generate_tests(metafunc) -> None:
    if "rng" in metafunc.fixturenames:
        metafunc.parametrize("rng", range(CASES), indirect=True)


@pytest.fixture
def rng(request) -> random.Random:
    return random.Random(f"{request.node.originalname} {request.param}")
