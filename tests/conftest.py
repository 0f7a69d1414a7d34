"""Fixture modules beside the tests can be imported; torch uses the cores there are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
