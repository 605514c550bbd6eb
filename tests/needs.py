"""What a machine may lack for some tests."""

from importlib.util import find_spec

import pytest


def has_triton() -> bool:
    """Whether it is installed; it is not imported."""
    try:
        return find_spec("triton") is not None
    except ValueError:  # made unimportable on purpose
        return False


needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
