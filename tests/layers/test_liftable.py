"""The folder moepp/layers, copied elsewhere under another name, beside torch and the standard library alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import moepp.layers

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("moepp", "lightning", "omegaconf", "mlflow", "torchmetrics"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
import torch
import lifted
from lifted import MoEConfig, MoELayer

for router in ("linear", "two_layer", "shared_null"):
    other = {"gating_residual": False, "capacity_factor": None} if router == "shared_null" else {}
    layer = MoELayer(MoEConfig(dim=16, hidden=8, router=router, **other))
    x = torch.randn(2, 8, 16, requires_grad=True)
    y, stats = layer(x)
    (y.square().sum() + stats.balance_loss).backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and layer.ffn.w_in.grad.any()
print(lifted.__name__, len(dir(lifted)) > 0)
"""


def test_the_folder_works_alone_under_any_name(tmp_path):
    shutil.copytree(Path(moepp.layers.__file__).parent, tmp_path / "lifted")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lifted", "True"]


def test_no_module_imports_the_package_by_its_name():
    sources = Path(moepp.layers.__file__).parent.rglob("*.py")
    trees = [ast.parse(source.read_text()) for source in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    absolute = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    absolute += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert not [name for name in absolute if name.partition(".")[0] == "moepp"]
