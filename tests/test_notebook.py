"""The notebook's cells run in their order, in one namespace, and what they promise is there at the end."""

import json
from pathlib import Path

import pytest

from tests.test_house import ROOT


NOTEBOOK = ROOT / "examples" / "duet.ipynb"
FEW = (
    "--max_steps 2 --lr_scheduler_type constant --max_samples 200 --max_eval_samples 20 --max_test_samples 20 "
    "--per_device_train_batch_size 4"
)


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_holds_no_output(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_the_notebook_trains_looks_asks_and_explains(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUET_NOTEBOOK", f"{FEW} --use_cpu --bf16 False --disable_tqdm True --max_new_tokens 4")
    namespace = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{NOTEBOOK.name}, {cell['id']}", "exec"), namespace)
    said = capsys.readouterr().out
    assert (
        "Stage 1, alignment" in said
        and "Stage 2, instruction tuning" in said
        and "How many objects are there? ->" in said
    )
    out = Path("outputs/notebook")
    assert "<html" in (out / "explained.html").read_text(encoding="utf-8")
