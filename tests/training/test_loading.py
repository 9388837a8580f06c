import json
import shutil
import subprocess
import sys

import pytest
import torch

from moepp.config import compose
from moepp.errors import UsageError
from moepp.records import RunRecord, write_json
from moepp.training.loading import load_run, load_sweep
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

ELSEWHERE = """
import json, sys
from pathlib import Path
from moepp.training.loading import load_run
run = load_run(sys.argv[1])
light = run.config.seed, run.status, run.final["val_loss"], len(run.metrics), run.provenance["data"]["vocab_size"]
text = run.tokenizer.decode(run.tokenizer.encode("the people").ids)
assert "torch" not in sys.modules, "torch was loaded before a model was asked for"
from moepp.training.generate import continue_text
from moepp.evaluation.checkpoints import load_checkpoint
said = continue_text(Path(sys.argv[1]), "the people", 4, 0.0, 0)
checkpoint = load_checkpoint(Path(sys.argv[1]), "cpu")
ids = checkpoint.require_tokenizer().encode("the people work").ids
import torch
loss = float(checkpoint.logits(torch.tensor([ids]))[0, -1].logsumexp(0))
print(json.dumps([*light, text, said, checkpoint.end_of_text == run.end_of_text, loss]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a finished run, moved to where nothing else is: its corpus and its tokens are deleted."""
    home = tmp_path_factory.mktemp("home")
    words = ["the", "state", "of", "our", "union", "is", "strong", "and", "people", "work", "hard", "for", "peace"]
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator)) for _ in range(60)]
    (home / "text.txt").write_text("\n\n".join(lines))
    config = freeze(compose(RunConfig, [
        "size=smoke", "tracking=jsonl", "data=text", f"data.path={home / 'text.txt'}", r"data.separator=\n\s*\n",
        f"data.cache={home / 'cache'}", f"runs={home / 'runs'}", "model.vocab_size=280", "trainer.steps=2",
        "trainer.accelerator=cpu", "trainer.progress=false", "trainer.expert_timing=false", "data.val_share=0.2",
    ]))  # fmt: skip
    record = train(config, run_directory(config))
    kept = shutil.copytree(record.path, tmp_path_factory.mktemp("elsewhere") / "run")
    shutil.rmtree(home)
    return kept


@pytest.fixture
def unfinished(alone, tmp_path):
    run = shutil.copytree(alone, tmp_path / "run")
    (run / "done").unlink()
    (run / "checkpoints" / "final.ckpt").unlink()
    return run


def test_a_record_is_enough_by_itself(alone, tmp_path):
    """In a process that knows neither text nor tokens, nor the folder in which the run was trained."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(alone)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seed, status, loss, logged, ids, text, said, same_end, _ = json.loads(done.stdout)
    assert (seed, status, text, same_end) == (0, "done", "the people", True)
    assert loss == RunRecord(alone).final()["val_loss"] and logged == len(RunRecord(alone).metrics())
    assert 256 < ids <= 280 and said.startswith("the people") and len(said) > len("the people")


def test_what_needs_the_text_of_a_run_says_that_it_is_not_here(alone):
    from moepp.evaluation.checkpoints import load_checkpoint
    from moepp.routing.sources import task_texts

    with pytest.raises(UsageError, match="held-out text of the run is not on this machine") as error:
        task_texts(load_checkpoint(alone, "cpu"), None, 2, 2)
    assert "\n" not in str(error.value)


def test_another_checkpoint_of_a_run_gives_its_own_weights(alone, tmp_path):
    run = shutil.copytree(alone, tmp_path / "run")
    state = torch.load(run / "checkpoints" / "final.ckpt", weights_only=True)
    state["state_dict"] = {name: torch.zeros_like(value) for name, value in state["state_dict"].items()}
    torch.save(state, run / "checkpoints" / "step-00000001.ckpt")
    found = load_run(run / "checkpoints" / "step-00000001.ckpt")
    assert found.path == run and not any(value.any() for value in found.model.state_dict().values())
    assert any(value.any() for value in load_run(run).model.state_dict().values())


def test_what_is_no_run_or_has_not_got_that_far_is_said_in_a_line(alone, unfinished, tmp_path):
    with pytest.raises(UsageError, match=r"is no run: there is no .*config\.yaml"):
        load_run(tmp_path)
    run = load_run(unfinished)
    assert run.status == "started" and run.config == load_run(alone).config
    with pytest.raises(UsageError, match=r"no checkpoint .*final\.ckpt; the run is not finished"):
        _ = run.model
    (unfinished / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        _ = run.tokenizer
    (unfinished / "provenance.json").write_text('{"data": ')
    with pytest.raises(UsageError, match=r"provenance\.json cannot be read"):
        _ = run.end_of_text


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b'{"step": 2, "time"'])
def test_damaged_parts_are_said_in_a_line(alone, tmp_path, damage):
    run = shutil.copytree(alone, tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(damage)
    (run / "checkpoints" / "final.ckpt").write_bytes(damage)
    for part in ("metrics", "final", "model"):
        with pytest.raises(UsageError) as error:
            getattr(load_run(run), part)
        assert "\n" not in str(error.value)
    assert load_run(run).status == "damaged"


def test_a_sweep_is_its_runs_by_arm_and_seed(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "aaaa")
    trials = [
        {"arm": "zero", "seed": 0, "path": "aaaa", "steps": 2},
        {"arm": "zero", "seed": 1, "path": "bbbb", "steps": 2},
        {"arm": "copy", "seed": 0, "path": "cccc", "steps": 2, "left_out": True},
    ]
    write_json(tmp_path / "sweep.json", {"question": "Which?", "baseline": "zero", "trials": trials})
    sweep = load_sweep(tmp_path)
    assert (sweep.question, sweep.baseline) == ("Which?", "zero")
    assert {arm: list(runs) for arm, runs in sweep.arms.items()} == {"zero": [0, 1]}
    assert sweep.arms["zero"][0].final["val_loss"] > 0 and sweep.arms["zero"][1].status == "waiting"
    with pytest.raises(UsageError, match=r"is no sweep: there is no .*sweep\.json"):
        load_sweep(tmp_path / "aaaa")
