"""The code of docs/extend.md."""

import re
import shlex
from functools import partial
from pathlib import Path

from registered import forgotten

from moepp import cli
from moepp.sweeps.timing import time_arms

PAGE = Path(__file__).parent.parent / "docs" / "extend.md"
FAST = [
    "tracking=jsonl", "trainer.progress=false", "trainer.expert_timing=false", "trainer.threads=1",
    "data.corpus_options.documents=100",
]  # fmt: skip


def test_the_page_trains_sweeps_and_reports_what_it_defines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # threads that spin for each other's core take minutes
    monkeypatch.setattr("moepp.sweeps.timing.time_arms", partial(time_arms, repeats=1))
    blocks = re.findall(r"```(python|yaml|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = []
    for language, text in blocks:
        if language == "sh":
            commands += [shlex.split(line)[1:] for line in text.splitlines()]
        else:
            Path(re.match(r"# (\S+)", text)[1]).write_text(text)
    for words in commands:
        with forgotten():
            one_seed = ["--seeds", "0"] if words[0] == "sweep" else []
            assert cli.main([*words[:3], *one_seed, *words[3:], *(FAST if words[0] != "report" else [])]) == 0
    found = capsys.readouterr().out
    assert "half_share" in found and len(commands) == 5
    report = Path("runs/parts-smoke/report/report.md").read_text()
    assert all(word in report for word in ("half", "cosine", "signs", "earn its place"))
    assert all("mine/largest" in path.read_text() for path in Path("runs/parts-smoke").glob("*/metrics.jsonl"))
    sweep = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(sweep.splitlines()) <= 25
