import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny

PAGE = Path(__file__).parents[2] / "docs/retrofit.md"


def test_the_code_of_the_page_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"model": tiny("olmoe"), "batches": [{"input_ids": IDS}], "folder": tmp_path}
    exec(code, names)
    assert len(names["rows"]) == 3
