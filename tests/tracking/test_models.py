from mirrored import finish, log, make_record, run_of, store

from moepp.tracking.mirror import Mirror, mirror_again
from moepp.tracking.settings import TrackingConfig


def trained(runs, name):
    record = make_record(runs / "train" / name)
    (record.path / "checkpoints").mkdir()
    (record.path / "checkpoints/final.ckpt").write_bytes(b"weights")
    log(record, 1, 2)
    finish(record)
    return record


def models_of(record, runs):
    run = run_of(record, runs)
    return store(runs).search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")


def test_a_checkpoint_is_a_model_with_what_was_measured(runs):
    record = trained(runs, "with-model")
    for _ in range(2):
        Mirror(record, TrackingConfig(), runs).sync(ended=True)
    [model] = models_of(record, runs)
    assert model.status == "READY" and model.params["lr"] == "0.0005"
    assert model.tags["checkpoint"] == str(record.path / "checkpoints") and model.tags["licence"] == "Apache-2.0"
    [metric] = model.metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("final/train_seconds", 1.0, "sotu")
    assert metric.dataset_digest == "0123456789abcdef"


def test_scores_that_come_later_are_attached_to_the_same_model(runs):
    record = trained(runs, "scored-later")
    Mirror(record, TrackingConfig(), runs).sync(ended=True)
    record.replace_final({"final/sciq_acc": 0.5})
    mirror_again(record)
    Mirror(record, TrackingConfig(), runs).sync(ended=True)
    [model] = models_of(record, runs)
    assert {metric.key: metric.value for metric in model.metrics}["final/sciq_acc"] == 0.5


def test_no_weights_are_copied_and_none_are_claimed(runs):
    record = trained(runs, "no-copy")
    Mirror(record, TrackingConfig(), runs).sync(ended=True)
    assert not list((runs / "mlartifacts").rglob("*.ckpt"))
    bare = make_record(runs / "train" / "without-weights")
    log(bare, 1, 2)
    finish(bare)
    Mirror(bare, TrackingConfig(), runs).sync(ended=True)
    assert not models_of(bare, runs)
