"""What a stranger imports, and what a type checker says of it."""

import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import moepp
import moepp.layers

TESTS = Path(__file__).parent


def test_the_package_loads_no_torch_until_a_name_is_asked_for():
    script = "import sys, moepp, moepp.layers; dir(moepp); moepp.RunConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("face", [moepp, moepp.layers], ids=lambda face: face.__name__)
def test_every_name_of_the_face_is_there(face):
    assert set(face.__all__) <= set(dir(face))
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="no attribute 'MoELayers'"):
        _ = face.MoELayers


def test_a_layer_and_a_decoder_are_finite_at_once():
    layer = moepp.MoELayer(moepp.MoEConfig(dim=64, hidden=128))
    assert layer(torch.randn(2, 8, 64))[0].isfinite().all()
    decoder = moepp.Decoder(moepp.DecoderConfig(dim=64, heads=4))
    assert decoder(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_the_face_trains_and_loads_a_run(overrides):
    record = moepp.train(moepp.compose(moepp.RunConfig, [*overrides, "trainer.steps=2"]))
    assert record.status == "done" and moepp.load_run(record.path).config.trainer.steps == 2


def test_the_public_face_has_no_type_errors():
    assert files("moepp").joinpath("py.typed").is_file()
    if find_spec("ty") is None:
        pytest.skip("needs ty")
    package = Path(moepp.__file__).parent
    faces = ["__init__.py", "register.py", "layers/__init__.py", "models/protocol.py", "models/build.py"]
    checked = [TESTS / "typed_consumer.py", *(package / face for face in faces)]
    command = [sys.executable, "-m", "ty", "check", "--python", sys.prefix, "--output-format", "concise"]
    done = subprocess.run([*command, *map(str, checked)], capture_output=True, text=True, cwd=package.parent)
    assert done.returncode == 0, done.stdout + done.stderr
