import importlib.util
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def interpreter_with_new_numpy(monkeypatch):
    """Triton 3.6 takes loop bounds with int() from arrays of one element, which numpy 2.4 refuses. And it looks for an
    overflow in every sum of offsets, a quarter of its time: there is none where all sizes are tiny.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_scalar_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_scalar_index)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
