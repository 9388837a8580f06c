"""Scores are kept by checkpoint and by what was asked."""

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from shutil import copy, copytree

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

from moepp.errors import RunError
from moepp.evaluation import trials
from moepp.evaluation.commands import scored
from moepp.evaluation.harness import MoEPlusPlus
from moepp.evaluation.results import load_task_results
from moepp.evaluation.tasks import TaskRequest, load_task, shared_out
from moepp.experiments import table4
from moepp.models.official import save_official
from moepp.reports.experiment import Context


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    folder = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", folder)  # of processes that are started


@pytest.fixture
def released(text_run, tmp_path):
    """The run's weights in the released layout, with its tokenizer."""
    folder = tmp_path / "released"
    save_official(
        MoEPlusPlus(text_run, device="cpu").checkpoint.model, folder, text_keys={"max_position_embeddings": 64}
    )
    (tokenizer,) = text_run.parents[2].glob("cache/*/tokenizer.json")
    copy(tokenizer, folder)
    return folder


def test_table_4_loses_at_most_the_task_it_was_interrupted_in(released, task_folder, monkeypatch):
    """The whole path from weights and local task files to claims; asked again, what is stored is not scored again."""
    from moepp.evaluation.evaluate import evaluate_task

    asked = []

    def interrupted(model, task, checkpoint):
        asked.append(task.request.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate_task(model, task, checkpoint)

    monkeypatch.setattr("moepp.evaluation.evaluate.evaluate_task", interrupted)
    options = {"weights": str(released), "tasks": "sciq,winogrande,mmlu:1", "tasks_dir": str(task_folder)}
    with pytest.raises(KeyboardInterrupt):
        table4.measure(Context("paper", options=options))
    assert list(load_task_results(released)) == ["sciq"]
    report = table4.measure(Context("paper", options=options))
    assert asked == ["sciq", "winogrande", "winogrande", "mmlu"]
    assert [row[0] for row in report.tables[0].rows] == ["sciq", "winogrande", "mmlu", "mean"]
    assert [claim.verdict for claim in report.claims] == ["undecided"] * 3  # two and four examples
    assert report.setup["checkpoint"].startswith("released:") and report.setup["tasks"][2]["examples"] == 4
    assert table4.measure(Context("paper", options=options)) == report and len(asked) == 4


def test_where_scores_cannot_be_kept_nothing_is_scored(text_run, task_folder, tmp_path, monkeypatch):
    run = copytree(text_run, tmp_path / "runs" / "train" / "0123")
    monkeypatch.setattr("moepp.evaluation.harness.load_checkpoint", None)  # would be called to score
    monkeypatch.setattr("os.access", lambda path, mode: path != run)
    with pytest.raises(RunError, match=r"cannot write .*0123, where its scores are kept; score a copy of it"):
        list(scored(run, "boolq:0", task_folder, 1))


def test_every_checkpoint_of_a_run_keeps_its_own_scores(text_run, task_folder, tmp_path):
    run = copytree(text_run, tmp_path / "runs" / "train" / "0123")
    own = load_task_results(run)
    for name in ("step-4", "step-8"):
        copy(run / "checkpoints" / "final.ckpt", run / "checkpoints" / f"{name}.ckpt")
    for name in ("step-4", "step-8"):
        list(scored(run / "checkpoints" / f"{name}.ckpt", "sciq", task_folder, None))
        path = run / "checkpoints" / "evaluation" / name / "sciq.jsonl"
        assert json.loads(path.read_text().splitlines()[0])["checkpoint"].startswith(f"{name}.ckpt:")
    assert load_task_results(run) == own


def test_what_stands_before_a_prompt_makes_other_scores(released, task_folder):
    """A template and a bos_token_id that are written in later; the same weights would be asked something else."""
    plain = list(scored(released, "sciq", task_folder, None))
    config, tokenizer = (released / name for name in ("config.json", "tokenizer.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": 5}))
    [other] = scored(released, "sciq", task_folder, None)
    assert other.about.checkpoint != plain[0].about.checkpoint
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (begun := Tokenizer.from_file(str(tokenizer))).post_processor = template
    begun.save(str(tokenizer))
    [begun] = scored(released, "sciq", task_folder, None)
    assert begun.about.checkpoint != other.about.checkpoint and begun.examples != other.examples


def test_a_result_that_cannot_be_read_is_scored_again(released, task_folder):
    first = list(scored(released, "sciq", task_folder, None))
    (released / "evaluation" / "sciq.jsonl").write_text("{cut off")
    assert list(scored(released, "sciq", task_folder, None)) == first


def test_a_limit_is_shared_out_evenly():
    assert shared_out({"a": 5, "b": 1, "c": 5}, 7) == {"a": 3, "b": 1, "c": 3}
    assert shared_out({"a": 5, "b": 5, "c": 5}, 2) == {"a": 1, "b": 1}
    assert shared_out({"a": 5, "b": 1}, None) == {"a": 5, "b": 1}


def test_a_limit_is_of_the_whole_task(released, task_folder):
    """MMLU has two subjects of two questions here; of three questions, the first subject gives two."""
    [result] = scored(released, "mmlu:0", task_folder, 3)
    assert [example.id for example in result.examples] == ["mmlu_anatomy/0", "mmlu_anatomy/1", "mmlu_virology/0"]
    [one] = scored(released, "mmlu:0", task_folder, 1)
    assert [example.id for example in one.examples] == ["mmlu_anatomy/0"] and one.about.examples == 1


def test_two_models_are_asked_with_prompts_that_are_made_once(text_run, task_folder, monkeypatch):
    from moepp.evaluation.evaluate import evaluate_task

    task = load_task(TaskRequest("boolq", 1), task_folder)
    evaluate_task(MoEPlusPlus(text_run, device="cpu"), task)
    again = MoEPlusPlus(text_run, device="cpu")
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.fewshot_context", None)  # would be called to make them
    assert evaluate_task(again, task).examples


def test_trials_are_scored_side_by_side(text_run, task_folder, tmp_path, monkeypatch):
    """Two processes and three runs; a fourth has its scores already."""
    runs = [copytree(text_run, tmp_path / "runs" / "sweep" / str(number)) for number in range(4)]
    list(scored(runs[3], "sciq", task_folder, None))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    done = list(trials.score_runs(runs, [TaskRequest("sciq", 0)], task_folder, None))
    assert done[0] == runs[3] and set(done) == set(runs)
    first, *others = (load_task_results(run)["sciq"] for run in runs)
    assert all(other.examples == first.examples for other in others)


def test_a_process_that_dies_while_scoring_ends_in_one_line(text_run, task_folder, tmp_path, monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, *_):
            super().__init__(1)

        def submit(self, *_):
            return super().submit(self.break_)

        def break_(self):
            raise BrokenProcessPool

    runs = [copytree(text_run, tmp_path / "runs" / "sweep" / str(number)) for number in range(2)]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(trials, "ProcessPoolExecutor", Pool)
    with pytest.raises(RunError, match="scores what is left"):
        list(trials.score_runs(runs, [TaskRequest("sciq", 0)], task_folder, None))
