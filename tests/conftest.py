"""For all tests: Triton's interpreter if there is no GPU, one compile cache, and the skip of tests marked `gpu`."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

# Both are read when triton and inductor are first imported, which has not happened yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Each user's own: another could not write there.
_CACHE = Path(tempfile.gettempdir()) / f"titan_fast_test_inductor_{os.getuid()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE))
# Read once, in the first matrix product on a GPU: without it no later run in this process could be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The clean process that tests/children.py forks looks nowhere else for that module on Python 3.11.
_ROOT = Path(__file__).parents[1]
_PATHS = [*map(str, (_ROOT / "tests", _ROOT, _ROOT / "kernels")), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS)
# Models in tests are so small that a second thread only waits, and on a busy machine for long.
torch.set_num_threads(1)


def pytest_configure() -> None:
    from titan_fast.compilation import name_code  # not before the environment above is set

    name_code()  # else compiled operators would be tested with derivatives of an earlier session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels run on: CUDA, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards that the runs of a module are trained on."""
    import runs  # not before the environment above is set

    return runs.prepare(tmp_path_factory.mktemp("data"))
