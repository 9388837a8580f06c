import importlib.util

import pytest
import torch


@pytest.fixture
def interpreter_with_new_numpy(monkeypatch):
    """Triton 3.6 takes loop bounds with int() from arrays of one element, which numpy 2.4 refuses."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_scalar_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_scalar_index)
