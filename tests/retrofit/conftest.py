import pytest
import torch


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Loads a folder as anyone does who has transformers alone."""
    import transformers

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda folder, **options: load(folder, trust_remote_code=True, **options).eval()


@pytest.fixture
def exported(overrides, tmp_path):
    """The folder of a retrofitted family, or of a run's `decoder`."""
    from families import IDS, tiny

    from moepp.config import compose
    from moepp.retrofit import calibrate, export, retrofit
    from moepp.training.export import export_run
    from moepp.training.run import train
    from moepp.training.settings import RunConfig

    def folder(family, dtype=torch.float32):
        if family != "decoder":
            model = retrofit(tiny(family).to(dtype), zero=1, copy=1, constant=2)
            return export(calibrate(model, [IDS], share=0.3), tmp_path / "model")
        words = ["model=moepp", "trainer.steps=2", "trainer.val_every=2", "optim.warmup_steps=1"]
        return export_run(train(compose(RunConfig, [*overrides, *words])).path, out=tmp_path / "model")

    return folder
