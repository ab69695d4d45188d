"""Fixtures: backbones saved once a session, composed anew for each test, and a guard against the network."""

import os


# Before any import of the libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is proved is proved where results are the same everywhere; test_accelerator.py is run by itself.
if not os.environ.get("DUET_TEST_ACCELERATOR"):
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from tests import tiny  # noqa: E402


torch.set_num_threads(1)


def pytest_configure(config):
    """The marks that the library puts on its common tests (test_common.py)."""
    marks = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test generate torch_compile_test"
    for name in marks.split():
        config.addinivalue_line("markers", f"{name}: of the library's common tests")


@pytest.fixture(autouse=True, scope="session")
def _caches_of_its_own(tmp_path_factory):
    """Nothing a test does may read or write the caches of the user."""
    import datasets
    import huggingface_hub.constants
    import transformers.dynamic_module_utils

    home = tmp_path_factory.mktemp("home")
    os.environ["HF_HOME"] = str(home)
    datasets.config.HF_DATASETS_CACHE = home / "datasets"
    huggingface_hub.constants.HF_HUB_CACHE = str(home / "hub")
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(home / "modules")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of the saved backbones: `folders("vit-gpt2")` is `(vision, text)`."""
    saved = {}

    def get(pair):
        if pair not in saved:
            root = tmp_path_factory.mktemp(pair)
            save_vision, save_text, _ = tiny.PAIRS[pair]
            saved[pair] = save_vision(root / "vision"), save_text(root / "text")
        return saved[pair]

    return get


@pytest.fixture(params=list(tiny.PAIRS))
def pair(request):
    """Each of the two pairs of backbones."""
    return request.param


@pytest.fixture
def composed(pair, folders):
    """A freshly composed model and its processor."""
    return tiny.compose(*folders(pair), tiny.PAIRS[pair][2])


@pytest.fixture
def image():
    """`image(seed)` is a small picture, another one for each seed."""

    def draw(seed=0, size=(40, 28)):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return draw
