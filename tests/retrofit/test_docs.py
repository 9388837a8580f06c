import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import FAMILIES, IDS, text_data, text_run, tiny, transformers

PAGE = (Path(__file__).parents[2] / "docs/retrofit.md").read_text()
FROM_A_HUB_ID, IN_PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SCIQ = {
    "question": "x",
    "distractor1": "b",
    "distractor2": "c",
    "distractor3": "d",
    "correct_answer": "a",
    "support": "",
}


def test_five_lines_lead_from_a_hub_id_to_an_evaluated_model(overrides, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, tasks = tmp_path / "mixtral", tmp_path / "tasks"
    tiny("mixtral", num_hidden_layers=2, vocab_size=300).save_pretrained(folder)
    tokenizer = text_run(overrides, tmp_path, "model.vocab_size=300") / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    tasks.mkdir()
    (tasks / "sciq.jsonl").write_text(json.dumps(SCIQ | {"support": ""}) + "\n")
    code = FROM_A_HUB_ID.replace("allenai/OLMoE-1B-7B-0125", str(folder))
    code = code.replace("None, 100", f"Path({str(tasks)!r}), 1")
    words = [*overrides, *text_data(tmp_path)]
    names = {"Path": Path}
    assert code.count('"data=sotu"') == 1
    exec(code.replace('"data=sotu"', f"*{words!r}"), names)
    assert names["run"].is_relative_to(tmp_path)
    assert type(names["model"]).__name__ == "MixtralPlusPlusForCausalLM"
    assert "sciq" in capsys.readouterr().out


def test_the_code_without_the_suite_runs(tmp_path):
    names = {"model": tiny("olmoe"), "batches": [{"input_ids": IDS}], "folder": tmp_path}
    exec(IN_PYTHON, names)
    assert len(names["rows"]) == 3


def test_the_table_of_families_has_those_that_are_tested():
    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", PAGE.partition("<!-- families -->")[2], flags=re.MULTILINE))
    assert [family for family in FAMILIES if not rows[family].startswith("works")] == []
    assert rows["phimoe"].startswith("refused: PhimoeTopKRouter")
    folders = {path.name for path in (Path(transformers.__file__).parent / "models").iterdir()}
    assert rows.keys() <= folders
