"""Settings for all tests, and the fixtures they share."""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# deadline=None: torch's first call takes longer than hypothesis allows.
# HYPOTHESIS_PROFILE=heavy for a long run.
settings.register_profile("default", deadline=None, max_examples=15)
settings.register_profile("heavy", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # on tensors this small more threads only wait for each other


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache of decoded images."""
    monkeypatch.setenv("COCA_CACHE", str(tmp_path / "cache"))
