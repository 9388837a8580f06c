"""Figures 4 to 6 and the observations, measured on a sweep of four tiny runs that all tests here share."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from moepp.config import compose
from moepp.data.prepare import prepare
from moepp.errors import UsageError
from moepp.experiments import fig4, fig5, fig6, findings
from moepp.models.official import save_official
from moepp.records import write_json
from moepp.reports.experiment import USUAL, Context
from moepp.reports.report import write_report
from moepp.routing import measure as measured
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.weights import load_model

ARMS = {"moepp": "true", "moepp_no_residual": "false"}
WORDS = [
    "the",
    "expert",
    "routes",
    "naïve",
    "tokens",
    "quickly",
    "東京",
    "and",
    "copies",
    "zero",
    "logits",
    "of",
    "café",
]
TAGS = ["DET", "NOUN", "VERB", "ADJ", "NOUN", "ADV", "NOUN", "CONJ", "VERB", "ADJ", "NOUN", "ADP", "NOUN"]


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """`<folder>/gating_residual-smoke` with two arms and two seeds, trained on a few texts with words to tell apart."""
    folder = tmp_path_factory.mktemp("routing")
    (folder / "texts").mkdir()
    generator = random.Random(0)
    for i in range(16):
        (folder / "texts" / f"{i:02}.txt").write_text(" ".join(generator.choices(WORDS[i % 5 :], k=260)))
    base = [
        "size=smoke", "tracking=jsonl", "data=text", f"data.path={folder}/texts/*.txt", f"data.cache={folder}/cache",
        f"runs={folder}", "model.vocab_size=300", "model.layers=3", "data.val_share=0.4", "data.seq_len=32",
        "trainer.progress=false", "trainer.expert_timing=false", "trainer.accelerator=cpu", "trainer.threads=1",
    ]  # fmt: skip
    trials = []
    for arm, residual in ARMS.items():
        for seed in (0, 1):
            config = freeze(compose(RunConfig, [*base, f"model.gating_residual={residual}", f"seed={seed}"]))
            record = train(config, run_directory(config))
            trials.append({"arm": arm, "seed": seed, "path": str(record.path)})
    about = {"name": "gating_residual", "scale": "smoke", "baseline": "vanilla", "match": "tokens"}
    write_json(folder / "gating_residual-smoke" / "sweep.json", {**about, "trials": trials})
    return folder / "gating_residual-smoke"


@pytest.fixture
def measure(sweep, tmp_path):
    """Measures a study, writes its report and returns both."""

    def measured(study, **options):
        report = study.measure(Context("smoke", {"gating_residual": sweep}, options))
        provenance = {"command": "reproduce", "scale": "smoke", "started": "2026-01-02", "hardware": {"cpu": "x"}}
        return report, write_report(study, report, tmp_path / study.name, provenance)

    return measured


def table(report, name):
    found = next(t for t in (*report.tables, *(figure.data for figure in report.figures)) if t.name == name)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """The two ARC sets and MMLU, whose questions differ by task and subject."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(1)

    def words(start, count=9):
        return " ".join(generator.choices(WORDS[start : start + 4], k=count))

    def arc(start):
        return {"question": words(start), "choices": {"text": ["zero", "copy"], "label": ["A", "B"]}, "answerKey": "A"}

    def mmlu(subject, start):
        return {"question": words(start), "subject": subject, "choices": [words(start, 1)] * 4, "answer": 2}

    rows = {
        "arc_easy": [arc(0) for _ in range(12)],
        "arc_challenge": [arc(8) for _ in range(12)],
        "mmlu_test": [
            mmlu(*pair) for pair in (("astronomy", 0), ("philosophy", 4), ("marketing", 8)) for _ in range(8)
        ],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_fig4_from_a_fresh_clone_groups_held_out_documents(measure):
    report, files = measure(fig4.EXPERIMENT)
    rows = table(report, "load")
    assert 3 <= len(rows) <= 12 and all(row["group"].startswith("document") for row in rows)
    for row in rows:
        assert sum(row[f"{kind} share"] for kind in ("ffn", "constant", "copy", "zero")) == pytest.approx(1)
        assert row["FFN experts per token"] == pytest.approx(2 * row["ffn share"])
        assert row["low"] < row["FFN experts per token"] < row["high"]
    assert "No folder of tasks was given" in report.notes[0]
    assert [t.name for t in report.tables] == ["load"]  # the default texts have no subjects
    bars = table(report, "layers_1_to_3")
    assert {row["layer"] for row in bars} == {1, 2, 3} and len(bars) == 3 * len(rows) * 8
    assert {path.name for path in files} >= {"report.md", "middle_layer.svg", "layers_1_to_3.png", "load.csv"}


def test_fig4_of_tasks_stands_beside_the_paper(measure, tasks, sweep):
    report, files = measure(fig4.EXPERIMENT, tasks_dir=str(tasks), limit="10", subject_limit="7")
    rows = {row["group"]: row for row in table(report, "load")}
    assert list(rows) == ["ARC-E", "ARC-C", "MMLU"] and rows["ARC-C"]["examples"] == 10
    assert rows["MMLU"]["examples"] == 3 * 7
    areas = {row["group"]: row for row in table(report, "topics")}
    assert set(areas) == {"STEM", "humanities", "other"} and all(row["examples"] == 7 for row in areas.values())
    subjects = {row["subject"]: row for row in table(report, "subjects")}
    assert {name: row["area"] for name, row in subjects.items()} == {
        "astronomy": "STEM", "philosophy": "humanities", "marketing": "other",
    }  # fmt: skip
    for row in subjects.values():  # without capacity every token has two experts
        ours = sum(row[f"{kind} share"] for kind in ("constant", "copy", "zero")) + row["FFN experts per token"] / 2
        assert ours == pytest.approx(1) and row["zero share: low"] <= row["zero share"] <= row["zero share: high"]
    assert {"topics_middle_layer.svg", "subjects.png", "subjects.csv"} <= {path.name for path in files}
    assert rows["ARC-C"]["paper: FFN experts per token"] == 1.515
    assert len(report.claims) == 2 and "2 models" in report.claims[0].note


def test_fig4_paper_bars_sum_to_one():
    for ffn_per_token, *shares in fig4.PAPER.values():
        assert sum(shares) == pytest.approx(1, abs=0.02) and ffn_per_token == pytest.approx(2 * shares[0], abs=0.01)


def test_findings_test_every_observation_that_the_texts_allow(measure, tasks):
    report, _ = measure(findings.EXPERIMENT, tasks_dir=str(tasks), limit="24")
    statements = " ".join(claim.statement for claim in report.claims)
    assert len(report.claims) == 9 and "ARC-C uses more" in statements and "Topics" in statements
    effects = table(report, "effects")
    assert len(effects) == 2 * 9 and {row["model"] for row in effects} == {"seed 0", "seed 1"}
    assert all(0 < row["p"] <= 1 for row in effects)
    by_statement = {claim.statement: claim for claim in report.claims}
    for statement, claim in by_statement.items():
        own = [row["effect"] for row in effects if row["statement"] == statement]
        assert claim.effect == pytest.approx(sum(own) / 2)
    assert [row["layer"] for row in table(report, "layers")] == [1, 2, 3]


def test_findings_without_tasks_leave_out_what_needs_them(measure):
    report, _ = measure(findings.EXPERIMENT)
    assert len(report.claims) == 7 and not any("ARC" in claim.statement for claim in report.claims)


def test_fig5_counts_every_token_by_string_tag_and_part(measure, tmp_path):
    generator = random.Random(2)
    with open(tmp_path / "pos.jsonl", "w") as file:
        for i in range(30):
            chosen = [generator.randrange(len(WORDS)) for _ in range(12)]
            row = {"file": i // 3, "words": [WORDS[j] for j in chosen], "pos": [TAGS[j] for j in chosen]}
            file.write(json.dumps(row) + "\n")
    report, files = measure(fig5.EXPERIMENT, pos=str(tmp_path / "pos.jsonl"), words="360")
    tags = [row for row in table(report, "tags") if row["part of the word"] == "all"]
    assert {row["part of speech"] for row in tags} == set(TAGS)
    counted = sum(row["tokens"] for row in tags)
    strings = table(report, "strings")
    blanks = sum(row["tokens"] for row in strings if row["string"] == "Ġ")  # a token of its own before rare words
    assert counted == sum(row["tokens"] for row in table(report, "parts"))
    assert counted + blanks == sum(row["tokens"] for row in strings)
    assert {claim.statement.split()[0] for claim in report.claims} >= {"Verbs", "Word"}
    assert [row["FFN experts per token"] for row in strings] == sorted(
        (row["FFN experts per token"] for row in strings), reverse=True
    )
    assert {"by_tag.svg", "paper_strings.svg", "paper_strings.csv"} <= {path.name for path in files}
    assert [row["string"] for row in table(report, "paper_strings")] == list(fig5.PAPER)


def test_fig5_without_tags_has_the_strings_and_says_so(measure):
    report, files = measure(fig5.EXPERIMENT)
    assert "without parts of speech" in report.notes[0]
    assert [t.name for t in report.tables] == ["parts", "frequency", "paper_strings"] and table(report, "strings")
    assert "by_tag.svg" not in {path.name for path in files}
    assert all("ragments" in claim.statement or "loss" in claim.statement for claim in report.claims)


def test_fig6_pairs_the_arms_by_seed(measure):
    report, files = measure(fig6.EXPERIMENT)
    rows = table(report, "scores")
    assert [(row["arm"], row["score"]) for row in rows] == [
        (arm, rank) for arm in ARMS for rank in ("highest", "second")
    ]
    assert all(row["models"] == 2 and row["mean"] > 0 for row in rows)
    assert [row["paper: mode"] for row in rows] == [0.23, 0.105, 0.27, 0.10]
    histogram = table(report, "histograms")
    assert sum(row["share of tokens"] for row in histogram) == pytest.approx(4)  # two arms, two scores
    layers = table(report, "score_layers")
    assert layers[0]["layer"] == 1 and len(layers) == 6
    assert len(report.claims) == 6 and all("2 pairs of runs" in claim.note for claim in report.claims)
    assert "histograms.csv" in {path.name for path in files}


def test_a_released_checkpoint_takes_the_place_of_runs(measure, sweep, tasks, tmp_path):
    directory = json.loads((sweep / "sweep.json").read_text())["trials"][0]["path"]
    model, config = load_model(Path(directory))
    with pytest.raises(UsageError, match="has no tokenizer"):
        save_official(model, tmp_path / "release", text_keys={"max_position_embeddings": 64})
        measure(fig4.EXPERIMENT, weights=str(tmp_path / "release"), tasks_dir=str(tasks))
    tokenizer = prepare(config.data).path / "tokenizer.json"
    (tmp_path / "release" / "tokenizer.json").write_text(tokenizer.read_text())
    report, _ = measure(fig4.EXPERIMENT, weights=str(tmp_path / "release"), tasks_dir=str(tasks))
    assert "one model" in report.claims[0].note
    with pytest.raises(UsageError, match="a released checkpoint brings no held-out text"):
        measure(fig4.EXPERIMENT, weights=str(tmp_path / "release"))


@pytest.mark.parametrize("study", [fig4.EXPERIMENT, fig5.EXPERIMENT, fig6.EXPERIMENT, findings.EXPERIMENT])
def test_every_scale_of_the_runs_can_be_measured(study):
    assert study.scales == USUAL
    for amount in (measured.EXAMPLES, measured.SUBJECT_EXAMPLES, measured.WORDS):
        assert tuple(amount) == USUAL and sorted(amount.values()) == list(amount.values())


def test_a_token_that_begins_a_word_is_told_from_its_namesake():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "\u2581up": 1, "up": 2, "<0x0A>": 3}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert [measured._string(tokenizer, token) for token in (1, 2, 3)] == ["␣up", "up", "<0x0A>"]


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [(fig4.EXPERIMENT, {"tasks_dir": "nowhere"}, "tasks_dir=nowhere: there is no such file or folder"),
     (fig5.EXPERIMENT, {"pos": "nowhere.jsonl"}, "pos=nowhere.jsonl: there is no such file or folder")],
)  # fmt: skip
def test_wrong_options_are_one_line(measure, study, options, message):
    with pytest.raises(UsageError, match=message):
        measure(study, **options)
