import sys

import pytest

from tests.surgery.oracle import Oracle


@pytest.fixture
def same(tmp_path, chains_run):
    """The fused model behaves as the stock one: see :class:`tests.surgery.oracle.Oracle`."""
    yield Oracle(tmp_path, chains_run)
    for name in [name for name in sys.modules if name.startswith("written_")]:
        del sys.modules[name]
