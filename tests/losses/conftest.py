import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes():
    """Four processes that the tests of this folder share."""
    pool = Processes(4)
    yield pool
    pool.close()
