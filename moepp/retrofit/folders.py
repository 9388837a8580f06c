"""Retrofitted models in folders: transformers' own, with one file of code beside the weights, and two layouts that
other engines read.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moepp.errors import UsageError
from moepp.retrofit import modeling, modeling_form
from moepp.retrofit.calibration import require
from moepp.retrofit.modeling import NEW_OF_ROUTER, PlusPlusRouter, blocks, family, plus_plus, plus_plus_name, routers
from moepp.retrofit.surgery import retrofit

CODE = "modeling_moepp.py"


def export(model: nn.Module, folder: str | Path, format: Literal["hf", "zeda", "longcat"] = "hf") -> Path:
    """Writes the model. `hf` runs in plain transformers with `trust_remote_code=True`, without moepp; `zeda`
    (arXiv 2605.18643) and `longcat` (arXiv 2509.01322) hold new rows inside the router's own matrix, which leaves no
    place for offsets, a gating residual or constant experts. Raises UsageError where something would be lost.
    """
    require(model)
    if format not in WRITERS:
        raise UsageError(f"format={format!r}: must be one of {', '.join(WRITERS)}")
    folder = Path(folder)
    WRITERS[format](model, folder)
    return folder


def write_hf(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    heads = auto_classes(model)
    with open(folder / CODE, "w") as code:
        code.write(one_file())
        for cls in dict.fromkeys(heads.values()):
            name = plus_plus_name(cls)
            code.write(f"\n\nfrom {cls.__module__} import {cls.__name__}  # noqa: E402\n\n")
            code.write(f"{name} = plus_plus({cls.__name__})\n")
            code.write(f"{name}.__module__ = __name__  # the file that save_pretrained copies\n")
    edit_config(folder, auto_map={auto: f"{Path(CODE).stem}.{plus_plus_name(cls)}" for auto, cls in heads.items()})


def one_file() -> str:
    """What a folder carries: modeling.py, with the text of modeling_form.py in the place of its import."""
    code, form = (Path(module.__file__).read_text() for module in (modeling, modeling_form))
    return re.sub(rf"^from {modeling_form.__name__} import .*\n", lambda _: form, code, flags=re.MULTILINE)


def auto_classes(model: nn.Module) -> dict[str, type]:
    """What each of transformers' auto classes makes of this config, with the model's own class first: a folder is also
    loaded without a head, or with another one.
    """
    import transformers

    own, config, found = family(type(model)), type(model.config), {}
    for name in sorted(transformers.__all__):
        mapping = getattr(getattr(transformers, name), "_model_mapping", {}) if name.startswith("AutoModel") else {}
        if config in mapping:
            made = mapping[config]
            found[name] = made[0] if isinstance(made, tuple) else made
    if own not in found.values():
        return {"AutoModel": own}
    return dict(sorted(found.items(), key=lambda item: item[1] is not own))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def load(folder: str | Path, **options: Any) -> nn.Module:
    """The model that `export` or `save_pretrained` wrote, in any of the formats; `options` go to `from_pretrained`."""
    import transformers

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no config.json")
    config = json.loads(path.read_text())
    if "zce_nums" in config:
        return read_enlarged(
            Path(folder), config, dict(zip(config["zce_types"], config["zce_nums"], strict=True)), options
        )
    if config.get("model_type") == "longcat_flash" and "moepp" not in config:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if "moepp" not in config:
        raise UsageError(f"{folder} holds a model without new experts: load it by transformers and retrofit it")
    name = next(iter(config["architectures"])).replace("PlusPlus", "")
    return plus_plus(getattr(transformers, name)).from_pretrained(folder, **options)


def write_zeda(model: nn.Module, folder: Path) -> None:
    refuse_what_rows_cannot_hold(model, "zeda", {"a bias on the choice": model.config.moepp["form"]["bias"]})
    counts = {kind: count for kind in ("copy", "zero") if (count := model.config.moepp[kind])}
    changes = {"zce_types": list(counts), "zce_nums": list(counts.values()), "use_zce_mask": False}
    write_enlarged(model, folder, enlarged(model), changes)


def write_longcat(model: nn.Module, folder: Path) -> None:
    """Only LongCat's own models have its attention and its router: their identity experts grow by the copies."""
    if model.config.model_type != "longcat_flash":
        raise UsageError(f"format=longcat holds LongCat-Flash models, not {model.config.model_type}: use format=hf")
    refuse_what_rows_cannot_hold(model, "longcat", {"zero experts": model.config.moepp["zero"]})
    copies, state = model.config.moepp["copy"], enlarged(model)
    for name, value in state.items():
        if name.endswith((".e_score_correction_bias", ".gate_up_proj")):  # transformers has rows for identities there
            state[name] = torch.cat([value, value.new_zeros(copies, *value.shape[1:])])
    changes = {"zero_expert_num": (model.config.zero_expert_num or 0) + copies, "zero_expert_type": "identity"}
    write_enlarged(model, folder, state, changes | {"architectures": [family(type(model)).__name__]})


def refuse_what_rows_cannot_hold(model: nn.Module, format: str, others: dict[str, Any]) -> None:
    settings = model.config.moepp
    reasons = others | {
        "constant experts": settings["constant"],
        "a gating residual": any(r.residual is not None and r.residual.any() for r in routers(model)),
        "offsets": any(router.offset.any() for router in routers(model)),
        "scaled copies": settings["scaled_copy"] and settings["copy"],
        "a factor for each expert's gate": settings["form"].get("expert_scale"),  # unknown to older folders
        "layers without new experts": len(blocks(model)) != len(settings["layers"]),
    }
    if lost := [name for name, there in reasons.items() if there]:
        raise UsageError(f"format={format} has no place for {', '.join(lost)}: use format=hf")


def enlarged(model: nn.Module) -> dict[str, Tensor]:
    """The family's own state, each router's matrix with the new rows below its own."""
    state = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, PlusPlusRouter):
            matrix = next(name for name, p in module.named_parameters() if p.dim() == 2 and name not in NEW_OF_ROUTER)
            state[f"{path}.{matrix}"] = torch.cat([state[f"{path}.{matrix}"], state[f"{path}.new_rows"]])
            for name in NEW_OF_ROUTER:
                state.pop(f"{path}.{name}", None)
    return state


def write_enlarged(model: nn.Module, folder: Path, state: dict[str, Tensor], changes: dict[str, Any]) -> None:
    model.save_pretrained(folder, state_dict=state)
    edit_config(folder, **changes)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("moepp")
    path.write_text(json.dumps(config, indent=2) + "\n")


def read_enlarged(folder: Path, config: dict[str, Any], counts: dict[str, int], options: dict[str, Any]) -> nn.Module:
    import transformers
    from safetensors.torch import load_file

    name = next(iter(config["architectures"])).replace("PlusPlus", "")
    cls = getattr(transformers, name)
    state: dict[str, Tensor] = {}
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise UsageError(f"{folder} holds no weights in *.safetensors")
    for file in files:
        state |= load_file(file)
    plain = cls.config_class.from_pretrained(folder)
    rows, new = {}, sum(counts.values())
    for key in [key for key in state if key.endswith(("gate.weight", "router.weight"))]:
        if state[key].shape[0] > new:
            state[key], rows[key.rpartition(".")[0]] = state[key].split([len(state[key]) - new, new])
    model = cls.from_pretrained(None, config=plain, state_dict=state, **options)
    retrofit(model, **{"zero": 0, "copy": 0, "constant": 0} | counts, gating_residual=False, init="zeda")
    # Files may call a block otherwise than the model does; both number the layers alike.
    by_layer = {layer_of(path): module for path, module in model.named_modules() if isinstance(module, PlusPlusRouter)}
    with torch.no_grad():
        for path, new_rows in rows.items():
            by_layer[layer_of(path)].new_rows.copy_(new_rows)
    return model


def layer_of(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split(".") if part.isdecimal())


WRITERS = {"hf": write_hf, "zeda": write_zeda, "longcat": write_longcat}
