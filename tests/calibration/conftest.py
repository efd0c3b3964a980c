"""What the tests of conversion share."""

import pytest

from diffoundry.calibration import stage


@pytest.fixture
def scans(monkeypatch):
    """How often the loop was run to convert a bundle."""
    made = []
    real = stage.convert_models
    monkeypatch.setattr(stage, "convert_models", lambda *args, **kwargs: (made.append(1), real(*args, **kwargs))[1])
    return made
