"""The rehearsal of scripts/gpu_window.py, without a GPU: what is packed, run in an interpreter that lacks what a GPU's
machine lacks, and kept; and that no stage can take another down.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from window import keep, node, pack, parcel, runs, stages, summary  # noqa: E402

from moepp.errors import Interrupted, UsageError  # noqa: E402

SCRIPT = str(ROOT / "scripts" / "gpu_window.py")
MACHINE = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "python": "3.12.3", "torch": "2.11.0", "CUDA": "13.0"}
MACHINE |= {"driver": "580.1", "date": "2026-01-02", "commit": ""}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty documents of made-up sentences, between blank lines."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=400)) for _ in range(40)))
    return path


@pytest.fixture(scope="module")
def packed(text):
    folder = text.parent / "pack"
    pack.pack(folder, text)
    return folder


def window(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, **options)


def outcomes(state):
    return {name: found["outcome"] for name, found in state["stages"].items()}


def members(out):
    with tarfile.open(out / "window.tar.gz") as tar:
        return set(tar.getnames())


def test_two_packs_are_equal_in_every_byte_and_say_what_they_hold(packed, text, tmp_path):
    pack.pack(tmp_path / "again", text)
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (packed, tmp_path / "again")
    )
    assert first == second
    manifest = json.loads(first["manifest.json"])
    assert {*manifest["files"], "manifest.json"} == set(first) and manifest["text"]["documents"] == 40
    assert {"corpus.jsonl.xz", "tokenizer-8192.json", "tokenizer-16384.json"} < set(first)
    assert any(name.startswith("omegaconf-") for name in first)


def test_a_long_text_is_cut_after_a_document(text, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "TEXT_BYTES", 10_000)
    about = pack._write_corpus(text, tmp_path / "corpus.jsonl.xz", tmp_path)
    assert 0 < about["documents"] < about["of_documents"] == 40 and about["bytes"] <= 10_000


def test_a_pack_that_is_too_large_is_refused_and_the_old_one_stays(packed, text, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 1000)
    monkeypatch.setattr(pack, "_download", lambda folder: None)
    with pytest.raises(UsageError, match="more than 0; give less text"):
        pack.pack(packed, text)
    assert (packed / "manifest.json").exists() and len(list(packed.parent.iterdir())) == 2


def test_the_rehearsal_ends_with_all_its_files_and_they_are_kept(packed, tmp_path):
    bare = {**os.environ, "PYTHONPATH": str(Path(__file__).with_name("bare"))}
    out, results = tmp_path / "out", tmp_path / "results"
    # Of idle cores it takes half a minute; what others leave of them may be a sixth.
    done = window("run", "--minutes", 4, "--out", out, "--device", "cpu", "--pack", packed, env=bare, timeout=270)
    shown = done.stdout + done.stderr + (out / "summary.md").read_text()
    ended = outcomes(json.loads((out / "state.json").read_text()))
    assert list(ended) == ["tokens", "card", "layer", "training", "empty_experts", "tests", "runs"], shown
    assert set(ended.values()) == {"ok"}, shown
    assert sorted(path.name for path in out.iterdir()) == ["state.json", "summary.md", "window.tar.gz"]
    found = members(out)
    assert {"card/table.csv", "layer/report.md", "training/provenance.json", "runs/chosen.json"} <= found, shown
    assert not [name for name in found if name.endswith((".ckpt", ".bin", ".whl"))]

    kept = window("keep", out, "--results", results, "--device", "cpu")
    assert kept.returncode == 0, kept.stderr
    assert "For docs/results.md:" in kept.stdout and "`python run.py bench layer`:" in kept.stdout
    assert (results / "bench_card" / "cpu" / "table.csv").exists()
    assert "passed" in (results / "gpu_tests" / "cpu" / "report.md").read_text()
    assert "MoE++ in place of vanilla MoE" in (results / runs.SWEEP / "cpu" / "report.md").read_text()
    refused = window("keep", out, "--results", results)
    assert refused.returncode == 2 and "made with --device cpu" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pack", "nowhere"), "nowhere holds no pack"),
        (("--device", "cpu", "--stages", "cards"), "no stage 'cards'; choose from tokens, card"),
    ],
)
def test_what_is_missing_is_said_in_one_line(packed, tmp_path, words, message):
    given = () if "--pack" in words else ("--pack", packed)
    refused = window("run", "--minutes", "1", "--out", tmp_path / "out", *given, *words)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_results_of_two_cards_do_not_mix(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "_look", lambda device: {"device": device, "gpu": ""})
    (tmp_path / "state.json").write_text(json.dumps({"machine": MACHINE, "stages": {}}))
    with pytest.raises(UsageError, match="holds results of NVIDIA H100"):
        node._begin(tmp_path, packed, "cpu")


def test_what_may_hang_is_alone_and_before_all_other_tests_for_gpus(packed, tmp_path):
    first, rest = [stage for stage in node.stages(packed, tmp_path, "cuda") if "pytest" in stage.command]
    files = [word for word in rest.command if word.endswith(".py")]
    assert first.command[-1] == node.EMPTY_EXPERTS and node.EMPTY_EXPERTS not in files
    assert {"tests/layers/test_kernels.py", "tests/layers/test_kernels_gpu.py"} < set(files)
    assert all((ROOT / file).is_file() for file in (node.EMPTY_EXPERTS, *files))
    assert "tests/scripts/test_gpu_window.py" not in files and first.command[-3:-1] == ("-m", "gpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(node, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(stages, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(stages, "TICK_SECONDS", 0.1)


@pytest.fixture
def folders(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    return work, out


def stand_in(name, code, share=1.0, **options):
    return lambda work: stages.Stage(name, share, (sys.executable, "-c", textwrap.dedent(code)), work, **options)


def run_window(work, out, made, seconds):
    known = json.loads((work / "state.json").read_text()) if (work / "state.json").exists() else {"stages": {}}
    begun = node.Window(work, out, {"machine": MACHINE, **known}, dict(os.environ))
    code = begun.run([stage(work) for stage in made], time.monotonic() + seconds)
    return code, outcomes(begun.state)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


CRASHES = stand_in("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
HANGS = stand_in("hangs", "import time; print('begun', flush=True); time.sleep(600)", share=0.2)
DEAF = stand_in(
    "deaf",
    """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its child inherits that
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pids", "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    """,
    share=0.3,
)
STOPS = stand_in(
    "stops", "import os, sys; sys.exit(0 if os.path.exists('began') else open('began', 'w').close() or 130)"
)
WORKS = stand_in("works", "print(1, file=open('works', 'a'))")


def test_no_stage_takes_another_down_and_a_second_call_does_what_is_missing(quick, folders):
    work, out = folders
    code, ended = run_window(work, out, [CRASHES, HANGS, DEAF, STOPS, WORKS], 12)
    assert code == 1 and ended == {
        "crashes": "failed", "hangs": "timed out", "deaf": "timed out", "stops": "unfinished", "works": "ok",
    }  # fmt: skip
    assert not any(alive(int(pid)) for pid in (work / "pids").read_text().split())
    assert {"works", "hangs.txt", "state.json"} <= members(out)
    state = json.loads((out / "state.json").read_text())["stages"]
    assert state["crashes"]["code"] == -signal.SIGSEGV and state["hangs"]["why"] == "SIGTERM; begun"

    mended = stand_in("crashes", "")
    code, ended = run_window(work, out, [mended, STOPS, WORKS], 12)
    assert code == 0 and ended["crashes"] == ended["stops"] == "ok"
    assert (work / "works").read_text() == "1\n"  # not repeated


def test_a_stage_without_time_is_skipped_and_an_earlier_ones_time_is_passed_on(quick, folders):
    work, out = folders
    code, ended = run_window(work, out, [WORKS, HANGS, stand_in("late", "")], 0.1)
    assert code == 1 and ended == dict.fromkeys(("works", "hangs", "late"), "skipped: no time")
    run_window(work, out, [WORKS, stand_in("late", "", share=9.0)], 100)
    state = json.loads((out / "state.json").read_text())["stages"]
    assert state["works"]["limit"] == pytest.approx(10, abs=0.5) and state["late"]["limit"] > 92


def test_a_benchmark_that_lost_the_gpu_is_called_again_in_its_own_time(quick, folders):
    work, out = folders
    code = """
    import os, sys
    tries = sum(name.startswith("try") for name in os.listdir("."))
    open(f"try{tries}", "w")
    sys.exit(tries < 2)
    """
    assert run_window(work, out, [stand_in("bench", code, attempts=4)], 20) == (0, {"bench": "ok"})
    assert len(list(work.glob("try*"))) == 3


WINDOW = """
import sys
sys.path[:0] = [{root!r}, {scripts!r}, {here!r}]
import pathlib, signal, time
import test_gpu_window as made
from window import node, stages
stages.GRACE_SECONDS = 0.5
signal.signal(signal.SIGTERM, node._interrupt)
work, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
try:
    made.run_window(work, out, [made.WORKS, made.DEAF], 600)
except made.Interrupted as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_window_that_is_ended_from_outside_leaves_what_is_finished_and_no_process(folders, number):
    work, out = folders
    code = WINDOW.format(root=str(ROOT), scripts=str(ROOT / "scripts"), here=str(Path(__file__).parent))
    running = subprocess.Popen([sys.executable, "-c", code, str(work), str(out)])
    wait_until(lambda: (work / "pids").exists() and (work / "pids").read_text())
    pid = int((work / "pids").read_text().split()[0])
    running.send_signal(number)
    running.wait(20)
    wait_until(lambda: not alive(pid))
    state = json.loads((out / "state.json").read_text())["stages"]
    assert "works" in members(out) and state["works"]["outcome"] == "ok"
    assert state["deaf"]["outcome"] == ("running" if number == signal.SIGKILL else "unfinished")
    if number == signal.SIGKILL:
        os.kill(int((work / "pids").read_text().split()[1]), signal.SIGKILL)  # of a process that asked for no such tie
    else:
        assert running.returncode == Interrupted.exit_code


def test_another_machine_goes_on_from_what_came_back(folders, tmp_path):
    work, out = folders
    (work / "runs").mkdir()
    (work / "runs" / "chosen.json").write_text("{}")
    for run in ("a", "b"):
        (work / "runs" / run).mkdir()
    (work / "runs" / "a" / "tokenizer.json").write_text("[1]")
    (work / "runs" / "b" / "tokenizer.json").hardlink_to(work / "runs" / "a" / "tokenizer.json")  # as records do
    parcel.publish(work, out, {"machine": MACHINE, "stages": {"card": {"outcome": "ok"}}})
    parcel.unpack(out / "window.tar.gz", tmp_path / "other")
    assert (tmp_path / "other" / "runs" / "chosen.json").exists()
    assert [(tmp_path / "other/runs" / run / "tokenizer.json").read_text() for run in "ab"] == ["[1]"] * 2


def test_what_is_too_large_to_come_back_is_left_out_traces_first(folders, monkeypatch):
    work, out = folders
    monkeypatch.setattr(parcel, "LIMIT", 5000)
    for name, size in {"trace.json": 4000, "large.csv": 6000, "small.csv": 100, "checkpoints/a": 1}.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(random.Random(0).randbytes(size))
    parcel.publish(work, out, {"machine": MACHINE, "stages": {}})
    assert members(out) == {"small.csv"}
    assert "for its size: trace.json, large.csv." in (out / "summary.md").read_text()


ALONE = """\
tests/layers/test_a.py::test_empty[8-4] PASSED [ 33%]
tests/layers/test_a.py::test_other FAILED [ 66%]
tests/layers/test_a.py::test_hang """
SHARED = """\
tests/layers/test_a.py::test_hang
tests/layers/test_a.py::test_empty[8 4]
[gw0] [ 33%] PASSED tests/layers/test_a.py::test_empty[8 4]
tests/layers/test_a.py::test_other
[gw1] [ 66%] FAILED tests/layers/test_a.py::test_other
FAILED tests/layers/test_a.py::test_other - AssertionError: 3 is not 2"""


@pytest.mark.parametrize(("log", "why"), [(ALONE, ""), (SHARED, "AssertionError: 3 is not 2")])
def test_a_log_that_was_cut_off_says_what_failed_and_what_never_ended(log, why):
    counted, failed, hung = summary.tests(log)
    assert counted == "1 passed, 1 failed"
    assert (
        failed == f"- tests/layers/test_a.py::test_other: {why}"
        and hung == "- tests/layers/test_a.py::test_hang: never ended"
    )


FILE = """\
def test_right(): pass
def test_wrong(): assert 3 == 2
def test_slow():
    import time; time.sleep(600)
"""


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["alone", "shared"])
def test_what_failed_is_known_before_a_run_is_cut_off_and_what_passed_is_not_repeated(quick, processes, tmp_path):
    file, log = tmp_path / "tests" / "test_some.py", tmp_path / "tests.txt"
    file.parent.mkdir()
    file.write_text(FILE)
    options = ["--rootdir", str(tmp_path), "-c", os.devnull, "tests/test_some.py"]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT / "scripts"), str(ROOT)))}
    stage = stages.Stage("tests", 1.0, (*node._pytest("cpu", log), *processes, *options), tmp_path)

    def call():
        """Until the slow test runs and the wrong one has failed, and what was printed."""
        begin = log.stat().st_size if log.exists() else 0
        printed = lambda: log.read_text()[begin:]  # noqa: E731
        seen = lambda: "assert 3 == 2" in printed() and "::test_slow" in printed()  # noqa: E731

        def meanwhile():
            if seen():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stages.run_stage(stage, 60, log, os.environ | paths, meanwhile)
        return printed()

    call()
    assert "test_right" not in call()
    assert summary.tests(log.read_text()) == [
        "1 passed, 1 failed", "- tests/test_some.py::test_wrong: assert 3 == 2",
        "- tests/test_some.py::test_slow: never ended",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("", "cpu")],
)
def test_results_are_kept_under_the_cards_name(gpu, name):
    assert keep.card(gpu) == name


def test_the_faster_backend_is_named_for_each_shape_that_both_have_run(tmp_path):
    table = tmp_path / "table.csv"
    rows = ["16384,8+4,0.75,bfloat16,forward,2.0,3.0", "65536,8+4,0.75,bfloat16,forward,BackendError: no,3.0"]
    table.write_text("\n".join(["tokens,experts,tau,dtype,direction,triton_ms,grouped_ms", *rows]))
    assert list(keep.faster_backends(table)) == [
        "- tokens 16384, experts 8+4, tau 0.75, dtype bfloat16, direction forward: triton, 1.50 times as fast as"
        " grouped"
    ]
