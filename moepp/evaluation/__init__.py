"""What trained models do with text: their routing, and their scores on downstream tasks.

Importing this package makes lm-evaluation-harness know the model `moepp`:

    import moepp.evaluation
    lm_eval.simple_evaluate(model="moepp", model_args="checkpoint=runs/train/<hash>", tasks=["sciq"])

Without the extra `eval`, stored results can still be read (moepp.evaluation.results).
"""

from importlib.util import find_spec

if find_spec("lm_eval") is not None:
    from lm_eval.api.registry import model_registry

    model_registry.register("moepp", target="moepp.evaluation.harness:MoEPlusPlus")
