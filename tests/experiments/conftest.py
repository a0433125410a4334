import pytest

from tests.support.digits import few_digits


@pytest.fixture
def tiny_digits(monkeypatch):
    return few_digits(monkeypatch)
