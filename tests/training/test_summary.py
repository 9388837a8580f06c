from moepp.records import RunRecord
from moepp.training.summary import summary


def test_figures_are_grouped_and_no_line_is_wider_than_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    record = RunRecord(tmp_path / "run")
    record.path.mkdir()
    shares = {f"final/{kind}_share": 0.1234 for kind in ("ffn", "zero", "copy", "constant", "dropped", "train_dropped")}
    record.log(9, {"final/val_loss": 4.5, "final/ffn_per_token": 1.2, "final/tokens_per_s": 2000.0, **shares})
    lines = list(summary(record))
    assert lines[0] == "held-out text  val_loss 4.5" and lines[1].startswith("routing        ffn_per_token 1.2  ")
    assert lines[2].startswith(" " * 15) and max(map(len, lines[: lines.index("")])) <= max(
        80, len(f"{record.path}") + 40
    )
    assert [line.split(":")[0] for line in lines[-3:]] == ["continue a text", "beside another", "train it again"]
