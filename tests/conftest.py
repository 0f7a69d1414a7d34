"""Fixture modules beside the tests can be imported; tiny models run fastest on one thread."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers inherit it
