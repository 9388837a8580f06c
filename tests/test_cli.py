import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moepp.cli import main
from moepp.config import CONF

ROOT = CONF.parent


def cli(capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("moepp.sweeps.runner, moepp.sweeps.plan", ["torch", "lightning", "mlflow"]),
        ("moepp.training.weights, moepp.training.throughput, moepp.training.generate", ["lightning", "torchmetrics"]),
    ],
)
def test_what_needs_no_training_starts_without_its_libraries(modules, without):
    script = f"import sys, {modules}\nassert not set({without}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["train", "--help"], ["reproduce", "--list"], ["sweep", "--help"]], ids=str
)
def test_light_commands_import_nothing_heavy(arguments):
    script = f"""
import sys
from moepp.cli import main
main({arguments!r})
heavy = {{"torch", "lightning", "mlflow", "datasets", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout or "table5" in done.stdout or "key=value" in done.stdout


def test_what_is_read_and_said_does_not_hang_on_the_locale(tmp_path):
    """Files are UTF-8 wherever they are read; a stream that lacks a character has it spelled out."""
    script = f"""
import sys
from pathlib import Path
from moepp.cli import main
from moepp.records import write_text
write_text(Path({str(tmp_path)!r}) / "a.txt", "\\u00b1 \\u2013")
sys.exit(main(["reproduce", "--list"]) or main(["sweep", "status", "\\u2013"]) - 2)
"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "unknown sweep '\\u2013'" in done.stderr, done.stderr
    assert (tmp_path / "a.txt").read_text("utf-8") == "\u00b1 \u2013"


def test_help_takes_less_than_half_a_second():
    process = subprocess.Popen([sys.executable, "run.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 0.4  # of the processor: other tests may run beside this one


def test_without_arguments_the_commands_are_listed(capsys):
    code, out, _ = cli(capsys)
    assert code == 0
    listed = re.findall(r"^  (\w+)  +[A-Z]", out, re.MULTILINE)
    commands = "demo reproduce sweep report train keys prepare generate evaluate dial compare rerun ui sync bench"
    assert set(commands.split()) <= set(listed) and "trial" not in listed  # which only programs call


def test_run_py_is_the_same_entry_point():
    done = subprocess.run([sys.executable, "run.py", "reproduce", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\ntable5 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model.expert.zero=1"], "unknown key model.expert.zero; did you mean model.experts.zero?"),
        (["train", "model=vanilla", "model.top_k=9"], "model.top_k=9 must lie between 1 and the 8 experts"),
        (["train", "data=text", "data.path=nothing/*.txt"], "data.path=nothing/*.txt: no file matches"),
        (["train", "data=text"], "data.corpus=text needs data.path"),
        (["train", "seed=1", "seed=2"], "seed=1 and seed=2 stand on one command line: give seed once"),
        (["keys", "size=tiny", "lr", "size=mini"], "size=tiny and size=mini stand on one command line"),
        (
            ["train", "data.path=x.txt"],
            "data.path=x.txt has no effect: data.corpus=sotu does not read data.path; leave it out, or choose a corpus "
            "that does, data=text data.path=x.txt",
        ),
        (["train", "data=sotu", "data.hub.id=x", "--dry-run"], "data.hub.id=x has no effect: data.corpus=sotu"),
        (["prepare", "data.text_column=body"], "data.text_column=body has no effect: data.corpus=sotu"),
        (["sweep", "plan", "tau", "data.path=x.txt"], "data.path=x.txt has no effect: data.corpus=sotu"),
        (["train", "trainer.devices=2"], "strategy=single trains on one device, not on trainer.devices=2"),
        (["train", "size=huge"], "size=huge: no such fragment; choose from 0.6b, 1b, 2b, 7b, mini,"),
        (["reproduce", "table55"], "no experiment and no sweep 'table55'; choose from"),
        (
            ["reproduce", "table5", "--scale", "big"],
            "table5 has no scale 'big'; choose from smoke, laptop, desk, gpu, paper",
        ),
        (["reproduce", "table5", "--scale", "smoke", "model.topk=1"], "unknown key model.topk; did you mean"),
        (["sweep", "run", "table5"], "unknown sweep 'table5'; choose from"),
        (["sweep", "status", "routers", "runs=nowhere"], "nowhere/routers-laptop holds no sweep; `python run.py"),
        (["report", "table5", "--runs", "nowhere"], "nowhere/zero_computation_experts-laptop holds no finished run"),
        (["compare", "nowhere", "nowhere"], "nowhere is neither a run directory nor <sweep directory>:<arm>"),
        (["rerun", "nowhere"], "nowhere is no run that has ended; only what is done, pruned or failed can be repeated"),
        (["trial", "nowhere/config.yaml"], "no config file nowhere/config.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, _, err = cli(capsys, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["", "nothing/*.txt"])
def test_files_that_are_not_there_are_refused_before_torch_is_loaded(path):
    script = f"""
import sys
from moepp.cli import main
assert main(["train", "data=text", "data.path={path}"]) == 2
assert not {{"torch", "lightning"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_corpus_shorter_than_one_sequence(capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"short text {name}")
    code, _, err = cli(
        capsys, "train", "size=smoke", "tracking=jsonl", "data=text", f"data.path={tmp_path}/*.txt",
        f"data.cache={tmp_path}/cache", "trainer.progress=false",
    )  # fmt: skip
    assert code == 2
    assert "fewer than data.seq_len + 1 = 33; give more text or a smaller data.seq_len" in err


def test_a_run_directory_that_cannot_be_written(capsys, overrides, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    words = [word for word in overrides if not word.startswith("runs=")]
    code, _, err = cli(capsys, "train", *words, f"runs={tmp_path}/file")
    assert code == 1
    assert err.startswith("error: cannot write the run record") and err.count("\n") == 1


@pytest.mark.skipif(find_spec("triton") is not None, reason="needs a machine on which triton cannot run")
def test_a_kernel_that_cannot_run_here_says_what_can(capsys, overrides):
    code, _, err = cli(capsys, "train", *overrides, "model.backend=triton")
    assert code == 2
    assert err.startswith("error: backend=triton needs") and "backend=auto" in err and err.count("\n") == 1


def test_words_that_are_no_overrides_are_refused(capsys):
    code, _, err = cli(capsys, "report", "table5", "model.top_k=1")
    assert code == 2 and "unrecognized arguments: model.top_k=1" in err


def test_train_prints_where_the_record_is_and_what_came_out(capsys, overrides):
    code, out, _ = cli(capsys, "train", *overrides)
    assert code == 0
    record = Path(out.splitlines()[0].removeprefix("run record: "))
    assert (record / "done").exists()
    assert "val_bits_per_byte" in out


def test_a_dry_run_counts_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli(capsys, "train", "recipe=s1", "size=1b", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["parameters"].strip().startswith("1,035,207,728 ")
    assert lines["tokens"].strip().startswith("100,000,595,968 (23,842 steps")
    assert "at an assumed 30% of the dense bf16 peak" in lines["GPU hours"] and "dolma" in lines["corpus"]


def test_a_dry_run_for_several_devices_shows_every_strategy_to_choose_from(capsys):
    words = ("train", "recipe=s1", "size=7b", "trainer.devices=8", "trainer.num_nodes=8")
    code, out, _ = cli(capsys, *words, "--dry-run")
    assert code == 0 and "under strategy=ddp on 64 devices" in out and "too much for 80 GB" in out
    assert "strategy=expert_parallel strategy.expert_parallel_size=8" in out and "strategy.shard_size=8" in out
    assert cli(capsys, *words)[0] == 2


def test_generate_continues_a_prompt(capsys, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.txt").write_text(f"the union is strong and number {i} is " * 30)
    code, out, err = cli(
        capsys, "train", "size=smoke", "tracking=jsonl", "data=text", f"data.path={corpus}/*.txt",
        f"runs={tmp_path}/runs", f"data.cache={tmp_path}/cache", "data.val_share=0.3", "trainer.steps=2",
        "trainer.progress=false", "trainer.expert_timing=false", "trainer.threads=1",
    )  # fmt: skip
    assert code == 0, err
    run = out.splitlines()[0].removeprefix("run record: ")
    code, first, _ = cli(capsys, "generate", run, "--prompt", "the union", "--tokens", "5", "--temperature", "0")
    assert code == 0 and first.startswith("the union")
    assert cli(capsys, "generate", run, "--prompt", "the union", "--tokens", "5", "--temperature", "0")[1] == first
    code, _, err = cli(capsys, "generate", str(tmp_path / "runs"))
    assert code == 2 and "is no run" in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("model.tau=0.5", "model.balance.tau"),
        ("model.zero=1", "model.experts.zero"),
        ("lr=1", "optim.lr"),
        ("steps=3", "trainer.steps"),
        ("vocab_size=9", "model.vocab_size"),
        ("modle=vanilla", "model"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_by_its_last_component(capsys, words, hint):
    code, _, err = cli(capsys, "train", words)
    assert code == 2 and err == f"error: unknown key {words.partition('=')[0]}; did you mean {hint}?\n"


def test_only_people_s_commands_are_suggested(capsys):
    assert cli(capsys, "trian") == (2, "", "error: no command 'trian'; did you mean train?\n")
    assert cli(capsys, "--version")[1].startswith("moepp, version ")


def test_a_run_goes_on_from_its_config_file(capsys, overrides):
    code, out, err = cli(capsys, "train", *overrides)
    record = Path(out.splitlines()[0].removeprefix("run record: "))
    assert code == 0, err
    assert cli(capsys, "train", "--config", f"{record}/config.yaml")[1] == out
    dry = cli(capsys, "train", f"config={record}/config.yaml", "model=vanilla", "trainer.steps=7", "--dry-run")[1]
    assert "(7 steps of 8 sequences of 32)" in dry


def test_any_file_is_a_fragment_and_yml_a_sweep(capsys, tmp_path):
    (tmp_path / "mine.yml").write_text("model: {dim: 48, heads: 3}")
    assert cli(capsys, "keys", "dim", f"size={tmp_path}/mine.yml")[1].startswith("model.dim=48 ")
    (tmp_path / "mine.yml").write_text((ROOT / "sweeps/tau.yaml").read_text())
    code, _, err = cli(capsys, "sweep", "status", f"{tmp_path}/mine.yml", "scale=smoke", "runs=nowhere")
    assert code == 2 and err.startswith("error: nowhere/tau-smoke holds no sweep")


@pytest.mark.parametrize("words", ["fig4 --tasks-dir nowhere", "table5 tasks=sciq tasks_dir=nowhere"])
def test_nothing_trains_before_a_folder_that_is_missing_is_seen(capsys, words):
    code, _, err = cli(capsys, "reproduce", *words.split(), "scale=smoke")
    assert code == 2 and re.match("error: .*nowhere is no folder", err)
