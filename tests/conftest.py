"""Fixture modules beside the tests can be imported; tiny models run fastest on one thread."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers inherit it
_CACHE = tempfile.TemporaryDirectory(prefix="pcpo-test-cache-", ignore_cleanup_errors=True)
os.environ["PCPO_CACHE"] = _CACHE.name  # prompt embeddings, away from the user's


def pytest_collection_modifyitems(config, items):
    """Tests that take minutes run where they are asked for alone: `pytest -m slow`."""
    if "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
