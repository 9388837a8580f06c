import json
import math
import re
import resource
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from moepp.cli import main
from moepp.config import CONF, compose
from moepp.records import RunRecord, read_json, write_json, write_text
from moepp.sweeps.leases import LeaseWatch
from moepp.training.settings import RunConfig

SWEEP = """
name: toy
question: Which expert?
base: [tracking=jsonl, data=tokens]
scales: {smoke: {set: [size=smoke]}, laptop: {set: [size=tiny, runs=elsewhere]}}
baseline: vanilla
arms: {vanilla: [model=vanilla], moepp: []}
seeds: [0, 1]
match: MATCH
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(SWEEP.replace("MATCH", "tokens"))
    return path


def sweep(capsys, action, path, *arguments, runs=None):
    code = main(["sweep", action, str(path), "--scale", "smoke", f"runs={runs or path.parent / 'runs'}", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def began(directory, trials):
    """A sweep of `trials` arms, and their records."""
    arms = ["vanilla", "moepp", *(f"arm{number}" for number in range(2, trials))][:trials]
    records = {arm: RunRecord(directory / f"{number:012x}") for number, arm in enumerate(arms)}
    described = [{"arm": arm, "seed": 0, "path": record.path.name, "steps": 100} for arm, record in records.items()]
    write_json(directory / "sweep.json", {"name": "toy", "baseline": "vanilla", "trials": described})
    for record in records.values():
        record.path.mkdir()
    return [*records.values()]


def finish(record, seconds=60.0):
    record.log(100, {"final/train_seconds": seconds})
    record.finish()


def train_half(record):
    """Half of 100 steps, ten in a second."""
    now = int(time.time() * 1000)
    rows = [f'{{"step": {step}, "time": {now - (50 - step) * 100}, "train/loss": 1.0}}\n' for step in range(10, 51, 10)]
    (record.path / "metrics.jsonl").write_text("".join(rows))


def test_plan_shows_trials_and_budgets_and_trains_nothing(capsys, toy):
    code, out, _ = sweep(capsys, "plan", toy, "--workers", "2")
    assert code == 0
    assert "toy at scale smoke: Which expert?\n4 trials of 8 steps: 2 arms, seeds 0, 1\n" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:1].isalpha()}
    assert rows["vanilla"][4] == rows["moepp"][4] == "2,048"
    assert "equal as declared: tokens" in out
    assert re.search(r"done: 0 trials; 2 run at a time\ntime: about \d+ s \(from a probe of each arm's steps, ", out)
    [measured] = [path for path in toy.parent.rglob("*") if path.suffix == ".json"]
    probed = measured.read_text()
    assert measured == toy.parent / "runs" / "toy-smoke" / "probe.json" and len(read_json(measured)["seconds"]) == 2
    sweep(capsys, "plan", toy, "--workers", "2")
    assert measured.read_text() == probed  # once


@pytest.mark.parametrize(
    ("action", "words", "message"),
    [
        ("plan", (), "--minutes belongs to `sweep run`, not to `sweep plan`"),
        ("run", ("launcher=slurm",), "--minutes is for launcher=local"),
    ],
)
def test_a_time_is_refused_where_nobody_would_keep_it(capsys, toy, action, words, message):
    code, _, err = sweep(capsys, action, toy, "--minutes", "5", *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_seeds_may_stand_before_overrides(capsys, toy):
    _, out, _ = sweep(capsys, "plan", toy, "--seeds", "3", "4", "5", "trainer.steps=6")
    assert "6 trials of 6 steps: 2 arms, seeds 3, 4, 5\n" in out


def test_plan_tells_an_arm_that_was_edited_after_it_had_run(capsys, toy):
    [begun] = began(toy.parent / "runs" / "toy-smoke", 1)
    plan = begun.path.parent / "sweep.json"
    write_json(plan, {**read_json(plan), "trials": [{"arm": "moepp", "seed": 0, "path": begun.path.name, "steps": 8}]})
    (begun.path / "config.yaml").write_text("{model: {experts: {zero: 3}}, data: {digest: of its tokens}}")
    code, _, err = sweep(capsys, "plan", toy)
    assert code == 2 and err.count("\n") == 1
    assert "begun before these arms were edited" in err and "model.experts.zero: 3 then, 1 now" in err
    assert "digest" not in err


SPACE = """
space: {tpe: {n: 2, keys: {optim.lr: {float: [1.0e-3, 1.0e-2]}}}}
"""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("1.0e-2", "2.0e-2"), "holds a search through another space"),
        ((SPACE, ""), "holds a search through another space or at other seeds, or no search"),
        (("[model=vanilla]", "[model=vanilla, optim.weight_decay=0.2]"), r"vanilla_000 \(optim\.weight_decay: "),
        (("baseline: vanilla", "baseline: moepp"), r"another sweep of the same name \(baseline: vanilla, not moepp\)"),
    ],
)
def test_plan_refuses_what_run_would_refuse_of_a_begun_search(capsys, toy, edit, message):
    from moepp.sweeps.reading import read_sweep
    from moepp.sweeps.search import searched

    toy.write_text(toy.read_text() + SPACE)
    [begun] = began(toy.parent / "runs" / "toy-smoke", 1)
    trial = {"arm": "vanilla_000", "group": "vanilla", "seed": 0, "path": begun.path.name, "point": {"optim.lr": 0.002}}
    known = {"baseline": "vanilla", "trials": [trial | {"steps": 8}], **searched(read_sweep(str(toy)), "smoke", None)}
    write_json(begun.path.parent / "sweep.json", known)
    asked = compose(RunConfig, ["tracking=jsonl", "data=tokens", "size=smoke", "model=vanilla", "optim.lr=0.002"])
    write_text(begun.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(asked)))
    assert "2 proposals for each of" in sweep(capsys, "plan", toy)[1]
    toy.write_text(toy.read_text().replace(*edit))
    code, _, err = sweep(capsys, "plan", toy)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


@pytest.mark.parametrize("words", [["one"], ["-1"], ["model.top_k=1"]])
def test_seeds_that_are_none_are_refused(capsys, toy, words):
    code, _, err = sweep(capsys, "plan", toy, "--seeds", *words)
    assert code == 2 and "--seeds" in err and err.count("\n") == 1


def test_plan_estimates_from_finished_trials(capsys, toy):
    began_there = began(toy.parent / "runs" / "toy-smoke", 2)
    finish(began_there[0], seconds=200)
    _, out, _ = sweep(capsys, "plan", toy, "--workers", "2")
    assert "done: 1 trials; 2 run at a time\ntime: about 5 min (from finished trials)" in out


def test_plan_refuses_arms_that_break_the_match(capsys, toy):
    toy.write_text(SWEEP.replace("MATCH", "flops_per_token"))
    code, out, err = sweep(capsys, "plan", toy)
    assert code == 2
    assert "the arms differ by" in err and "vanilla" in out


def test_status_says_what_every_trial_does(capsys, toy):
    done, running, failed, _, cut = began(toy.parent / "runs" / "toy-smoke", 5)
    finish(done)
    train_half(running)
    lease = LeaseWatch(running.path / "leases").claim()
    failed.fail("exit code 1; no memory", ["step 3", "no memory"])
    train_half(cut)
    code, out, _ = sweep(capsys, "status", toy)
    lease.release()
    head, metrics, *rows = out.splitlines()
    assert code == 0
    assert head == "toy-smoke: 1 done, 1 running, 1 failed, 2 waiting; about 2 min left"
    assert metrics == "final metrics: n = 1: all"
    assert rows[0].startswith("running  moepp s0, step 50 of 100, ") and " s left (process " in rows[0]
    assert rows[1:4] == ["failed   arm2 s0: exit code 1; no memory", "         | step 3", "         | no memory"]
    assert rows[4:] == ["waiting  arm3 s0", "waiting  arm4 s0, step 50 of 100"]


def test_a_trial_that_will_be_tried_again_has_not_failed(capsys, toy):
    [trial] = began(toy.parent / "runs" / "toy-smoke", 1)
    plan = trial.path.parent / "sweep.json"
    write_json(plan, read_json(plan) | {"retries": 1})
    trial.fail("no memory")  # and its worker died before it counted that
    assert sweep(capsys, "status", toy)[1] == "toy-smoke: 0 done, 0 running, 0 failed, 1 waiting\nwaiting  vanilla s0\n"
    for _ in range(2):
        trial.crash("no memory")
    assert "failed   vanilla s0: no memory" in sweep(capsys, "status", toy)[1]


@pytest.mark.parametrize("action", ["plan", "status", "retry"])
def test_a_folder_that_cannot_be_is_one_line(capsys, toy, action):
    code, _, err = sweep(capsys, action, toy, runs=toy / "below")
    assert code == 1
    assert err == f"error: cannot read or write {toy}/below/toy-smoke/sweep.json: Not a directory\n"


def test_the_folder_is_found_as_the_runner_finds_it(capsys, toy):
    code, _, err = sweep(capsys, "status", toy)
    assert code == 2
    runs, begins = f"{toy.parent}/runs", f"python run.py sweep run {toy} --scale smoke runs={toy.parent}/runs"
    assert err == f"error: {runs}/toy-smoke holds no sweep; `{begins}` begins one\n"
    assert main(["sweep", "status", str(toy)]) == 2
    assert "error: elsewhere/toy-laptop holds no sweep" in capsys.readouterr().err


def test_retry_forgets_failures_and_nothing_else(capsys, toy):
    done, failed, waiting = began(toy.parent / "runs" / "toy-smoke", 3)
    finish(done)
    train_half(failed)
    failed.crash("no memory")
    failed.fail("no memory")
    for forgotten in ("1 failed trials", "0 failed trials"):
        code, out, _ = sweep(capsys, "retry", toy)
        assert code == 0 and out.startswith(forgotten)
    assert (done.status, failed.status, waiting.status) == ("done", "started", "waiting")
    assert failed.crashes == [] and len(failed.metrics()) == 5


def test_status_names_a_finished_trial_whose_metrics_are_damaged(capsys, toy):
    done, damaged, _ = began(toy.parent / "runs" / "toy-smoke", 3)
    finish(done)
    finish(damaged)
    (damaged.path / "metrics.jsonl").write_bytes(b"")
    code, out, _ = sweep(capsys, "status", toy)
    assert code == 0 and out.startswith("toy-smoke: 1 done, 0 running, 0 failed, 1 damaged, 1 waiting")
    assert "final metrics: n = 1: all" in out
    assert f"damaged  moepp s0, step 100 of 100: {damaged.path}/metrics.jsonl is cut off" in out


def test_status_states_how_many_trials_have_each_metric(capsys, toy):
    for record, more in zip(
        began(toy.parent / "runs" / "toy-smoke", 3), ({"b": 1.0, "c": 1.0}, {"c": math.nan}, {}), strict=True
    ):
        finish(record)
        record.replace_final({f"final/{name}": value for name, value in more.items()} | {"final/a": 1.0})
    _, out, _ = sweep(capsys, "status", toy)
    assert out.splitlines()[1] == "final metrics: n = 3: 2; n = 1: b, c"


def logged(lines=40):
    """What a trial of the laptop scale leaves in its metrics.jsonl: some 20 figures in each of dozens of lines."""
    figures = {f"router/figure_{n}": 0.123456789 * n for n in range(20)}
    rows = [{"step": 10 * line, "time": 1000 * line, "train/loss": 1.0} | figures for line in range(1, lines + 1)]
    rows.append({"step": 10 * lines, "time": 1000 * lines, "final/train_seconds": 60.0, "final/val_loss": 1.0})
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_status_of_a_thousand_trials_takes_less_than_a_second_and_no_torch(toy):
    metrics = logged()
    for record in began(toy.parent / "runs" / "toy-smoke", 1000):
        (record.path / "metrics.jsonl").write_text(metrics)
        (record.path / "done").touch()
    script = f"""
import sys
from moepp.cli import main
assert main(["sweep", "status", {str(toy)!r}, "--scale", "smoke", "runs={toy.parent}/runs"]) == 0
assert not {{"torch", "lightning", "mlflow", "numpy"}} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], cwd=CONF.parent, capture_output=True, text=True)
    assert done.stdout == "toy-smoke: 1000 done, 0 running, 0 failed, 0 waiting\nfinal metrics: n = 1000: all\n", (
        done.stderr
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: other tests may run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
