import json
import math
from shutil import copy, copytree

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from moepp.errors import UsageError
from moepp.evaluation.checkpoints import load_checkpoint
from moepp.evaluation.commands import evaluate_checkpoint, evaluate_sweep, score_lines
from moepp.evaluation.evaluate import evaluate_task
from moepp.evaluation.harness import MoEPlusPlus
from moepp.evaluation.results import load_task_results, means
from moepp.evaluation.tasks import PAPER_SHOTS, TaskRequest, load_task, parse_tasks, stock_folder
from moepp.models.official import save_official
from moepp.records import RunRecord, write_json


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="module")
def model(text_run):
    return MoEPlusPlus(text_run, device="cpu", batch_tokens=256)


def instances(kind, *arguments):
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_scores_of_known_likelihoods_by_hand(unigram, task_folder):
    """A byte costs log 2 nats for a, log 4 for b: choices, accuracies and bits per byte follow."""
    found = evaluate_task(MoEPlusPlus(unigram), load_task(TaskRequest("sciq", 0), task_folder))
    nats = unigram.model.nats
    assert found.about.data.startswith("sciq.jsonl:") and found.about.examples_from == ""
    first, second = found.examples
    # distractors b, bb, bbb, then the right answer: a wins; bbbb loses alone and, per character, to none but itself
    assert first.choices == pytest.approx([nats(" b"), nats(" bb"), nats(" bbb"), nats(" a")])
    assert second.choices == pytest.approx([nats(" b"), nats(" bb"), nats(" bbb"), nats(" bbbb")])
    assert (first.gold, second.gold) == (3, 3)
    assert first.metrics == {"acc": 1.0, "acc_norm": 0.0}  # per character, the long answer spreads the space's cost
    assert second.metrics == {"acc": 0.0, "acc_norm": 1.0}
    assert (first.gold_bytes, second.gold_bytes) == (2, 5)
    space = -nats(" ") / math.log(2)
    scores = found.scores()
    assert scores["gold_bits_per_byte"].value == pytest.approx((2 * space + 1 + 4 * 2) / 7)
    assert scores["acc"].value == 0.5 and scores["acc"].error == pytest.approx(0.5)


def test_a_checkpoint_evaluates_from_the_harness_itself(text_run, model):
    import lm_eval

    task = {
        "task": "own", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "train",
        "dataset_kwargs": {"data_files": str(_own_data(text_run.parent))}, "doc_to_text": "{{q}}",
        "doc_to_choice": ["peace", "work"], "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model="moepp",
        model_args=f"checkpoint={text_run},device=cpu",
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # an index of all stock tasks takes many seconds
    )
    responses = [sample["filtered_resps"] for sample in found["samples"]["own"]]
    requests = [(sample["q"], f" {word}") for sample in _OWN for word in ("peace", "work")]
    expected = model.loglikelihood(instances("loglikelihood", *requests))
    flat = [response for pair in responses for response in pair]
    assert [nats for nats, _ in flat] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    right = [pair[sample["a"]][0] > pair[1 - sample["a"]][0] for pair, sample in zip(responses, _OWN, strict=True)]
    assert found["results"]["own"]["acc,none"] == sum(right) / len(right)


_OWN = [{"q": "the people work hard for", "a": 0}, {"q": "this land", "a": 1}]


def _own_data(folder):
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _OWN))
    return path


def test_rolling_likelihoods_cover_a_text_longer_than_the_context(model):
    short, long = "the state of our union", " ".join(["the people of this land work hard"] * 12)
    ids = model.tok_encode(long)
    assert len(ids) > 2 * model.checkpoint.context
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", (short,), (long,)))
    with torch.inference_mode():
        tokens = [model.prefix_token_id, *model.tok_encode(short)]
        logits = model.checkpoint.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    assert found[0] == pytest.approx(float(logits.gather(1, torch.tensor(tokens[1:])[:, None]).sum()), abs=1e-4)
    assert found[1] < found[0] < 0


def test_generation_is_greedy_and_stops(model):
    prompt = "the state of"
    ids = torch.tensor([model.tok_encode(prompt)])
    whole = model.checkpoint.model.generate(ids, 8)[0, ids.shape[1] :].tolist()
    text = model.checkpoint.tokenizer.decode(whole)
    plain, cut, stopped = model.generate_until(
        instances(
            "generate_until",
            (prompt, {"max_gen_toks": 8, "until": []}),
            ("land " * 100 + prompt, {"max_gen_toks": 8, "until": []}),
            (prompt, {"max_gen_toks": 8, "until": [text[3:5]]}),
        )
    )
    assert plain == text and stopped == text[: text.index(text[3:5])]
    assert isinstance(cut, str)
    with pytest.raises(UsageError, match="decodes greedily"):
        model.generate_until(instances("generate_until", (prompt, {"do_sample": True})))


def test_contexts_that_exceed_the_model_are_counted(text_run):
    model = MoEPlusPlus(text_run, device="cpu")
    near, far = "land " * 10 + "work hard for", "peace " * 200 + "land " * 60 + "work hard for"
    scores = model.loglikelihood(instances("loglikelihood", (near, " peace"), (far, " peace")))
    assert model.cut == 1 and scores[0][0] != scores[1][0]


def test_a_whole_text_scores_in_bits_per_byte(unigram, tmp_path, monkeypatch):
    """Texts need no question: the harness's bytes and the nats of all windows, and no accuracy beside them."""
    monkeypatch.setitem(PAPER_SHOTS, "wikitext", 0)  # an index of all stock tasks takes many seconds
    pages = ["abba " * 30, "bab"]
    (tmp_path / "wikitext.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    found = evaluate_task(MoEPlusPlus(unigram), load_task(TaskRequest("wikitext", 0), tmp_path))
    assert [example.gold_bytes for example in found.examples] == [150, 3] and found.about.cut == 0
    nats = [unigram.model.nats(page) for page in pages]
    assert [example.gold_nats for example in found.examples] == pytest.approx(nats, rel=1e-5)
    assert found.accuracy_metric == "" and means([found]).keys() == {"bits per byte"}
    assert found.scores().keys() == {"gold_bits_per_byte"}
    assert "means over 1 tasks: bits per byte" in "\n".join(score_lines([found]))


def test_every_task_of_the_paper_runs_on_local_files(model, task_folder):
    """Shots fall back on the evaluated file, without the question itself."""
    requests = [TaskRequest(name, min(1, shots)) for name, shots in PAPER_SHOTS.items()]
    results = [evaluate_task(model, load_task(request, task_folder)) for request in requests]
    found = {result.about.task: result for result in results}
    assert list(found) == list(PAPER_SHOTS)
    for name, result in found.items():
        assert len(result.examples) == (4 if name == "mmlu" else 2)
        assert all(example.gold_nats < 0 < example.gold_bytes for example in result.examples)
        assert set(result.scores()) >= {result.accuracy_metric, "gold_bits_per_byte"}
        if name not in ("lambada_openai", "nq_open"):
            assert [example.gold for example in result.examples][:2] == ([3, 3] if name == "sciq" else [0, 1])
            assert all(e.gold_nats == e.choices[e.gold] for e in result.examples)
            best = [max(range(len(e.choices)), key=e.choices.__getitem__) for e in result.examples]
            right = [choice == e.gold for choice, e in zip(best, result.examples, strict=True)]
            assert [e.metrics["acc"] for e in result.examples] == right
    assert found["mmlu"].examples[0].id == "mmlu_anatomy/0" and found["mmlu"].about.shots == 1
    assert found["boolq"].about.examples_from == "boolq.jsonl, without the question itself"
    assert found["nq_open"].accuracy_metric == "exact_match"


def test_a_run_keeps_its_scores_once(text_run, task_folder):
    record = RunRecord(text_run)
    table = evaluate_checkpoint(text_run, "sciq,winogrande", task_folder, None, 4096)
    assert "winogrande" in table and "means over 2 tasks" in table
    before = record.final()
    evaluate_checkpoint(text_run / "checkpoints" / "final.ckpt", "sciq", task_folder, 1, 4096)
    after = record.final()
    assert (before["sciq_examples"], after["sciq_examples"]) == (2, 1)
    assert after["winogrande_acc"] == before["winogrande_acc"] and after["val_loss"] == before["val_loss"]
    assert sum("final/sciq_acc" in line for line in record.metrics()) == 1
    stored = load_task_results(text_run)
    assert stored["sciq"].scores()["gold_bits_per_byte"].value == after["sciq_gold_bits_per_byte"]
    assert record.status == "done"


@pytest.fixture
def sweep_of_one(text_run, tmp_path):
    run = copytree(text_run, tmp_path / "runs" / "sweep-smoke" / "0123")
    trials = [{"arm": "vanilla", "seed": 0, "path": "0123"}, {"arm": "vanilla", "seed": 1, "path": "4567"}]
    write_json(run.parent / "sweep.json", {"trials": trials})
    return run.parent


def test_a_sweep_is_scored_once(sweep_of_one, task_folder, monkeypatch):
    evaluate_sweep(sweep_of_one, "sciq,boolq:1", task_folder, None)
    record = RunRecord(sweep_of_one / "0123")
    found = record.final()
    assert found["sciq_examples"] == 2 and "boolq_acc" in found
    with monkeypatch.context() as patched:
        patched.setattr("moepp.evaluation.harness.load_checkpoint", None)  # would be called to score again
        evaluate_sweep(sweep_of_one, "sciq,boolq:1", task_folder, None)
        with pytest.raises(TypeError):
            evaluate_sweep(sweep_of_one, "sciq,boolq:0", task_folder, None)
    assert record.final() == found


def test_the_run_that_is_scored_says_where_it_is_tracked(sweep_of_one, task_folder):
    """Whatever else lies beside it."""
    other = sweep_of_one / "0000"
    other.mkdir()
    (other / "config.yaml").write_text("{no: config}")
    assert "means over 1 tasks" in evaluate_checkpoint(sweep_of_one / "0123", "piqa", task_folder, None, 4096)
    write_json(sweep_of_one / "sweep.json", {"trials": [{"arm": "vanilla", "seed": 0, "path": "0000"}]})
    evaluate_sweep(sweep_of_one, "piqa", task_folder, None)  # none of which has ended


def test_the_order_of_models_does_not_change_their_prompts(model, task_folder):
    """Examples of the prompt are drawn anew for every document; the draws begin anew for every model."""
    loaded = load_task(TaskRequest("boolq", 1), task_folder)
    first, second = (evaluate_task(model, loaded) for _ in range(2))
    assert first == second


def test_a_released_checkpoint_scores_as_its_run_does(model, text_run, tmp_path):
    folder, request = tmp_path / "released", instances("loglikelihood", ("the people", " work hard"))
    save_official(model.checkpoint.model, folder)
    saved = json.loads((folder / "config.json").read_text())
    with pytest.raises(UsageError, match=r"has no tokenizer\.json; save one there"):
        load_checkpoint(folder, "cpu")
    (tokenizer,) = text_run.parents[2].glob("cache/*/tokenizer.json")
    copy(tokenizer, folder)
    for context in (None, 0, "long"):
        (folder / "config.json").write_text(json.dumps(saved | {"max_position_embeddings": context}))
        with pytest.raises(UsageError, match=r"config\.json: max_position_embeddings=.* must be a positive whole"):
            load_checkpoint(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(saved | {"max_position_embeddings": 4096, "bos_token_id": None}))
    released = MoEPlusPlus(folder, device="cpu")
    assert released.checkpoint.context == 4096 and released.checkpoint.prefix == released.checkpoint.end_of_text
    assert released.loglikelihood(request)[0][0] == pytest.approx(model.loglikelihood(request)[0][0], abs=1e-4)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("sciqq", r"has no task 'sciqq'; did you mean sciq"),
        ("", "is no task"),
        ("boolq:x", "is no task"),
        ("copa", "has no data for task copa"),
    ],
)
def test_impossible_requests_end_in_one_line(text_run, tmp_path, tasks, message, monkeypatch):
    few = tmp_path / "stock"  # an index of all stock tasks takes many seconds
    few.mkdir()
    for name in ("sciq", "super_glue/copa"):
        copytree(stock_folder() / name, few / name)
    monkeypatch.setattr("moepp.evaluation.tasks.stock_folder", lambda: few)
    with pytest.raises(UsageError, match=message):
        evaluate_checkpoint(text_run, tasks, tmp_path, None, 4096)


def test_a_damaged_file_ends_in_one_line(text_run, tmp_path):
    (tmp_path / "sciq.jsonl").write_text("{not json")
    with pytest.raises(UsageError, match=r"sciq\.jsonl is no file of JSON rows"):
        evaluate_checkpoint(text_run, "sciq", tmp_path, None, 4096)


def test_the_papers_shots_hold_unless_others_are_given():
    assert {r.name: r.shots for r in parse_tasks("paper")} == PAPER_SHOTS
    assert parse_tasks("boolq,sciq:3,copa") == [
        TaskRequest("boolq", 32), TaskRequest("sciq", 3), TaskRequest("copa", None),
    ]  # fmt: skip


def test_what_is_no_checkpoint_says_what_one_is(tmp_path):
    with pytest.raises(UsageError, match="is no run directory"):
        load_checkpoint(tmp_path)
