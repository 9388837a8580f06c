"""Models of transformers as a config names them: what is added to them, and what their folders say. Loads no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moepp.errors import UsageError
from moepp.layers.bounds import Bounded, Count, Range, Whole
from moepp.models.packaged import PACKAGED, packaged

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what families call their number
SLOTS = ("num_experts_per_tok", "moe_topk")  # and that of the experts a token is given
WEIGHTS = "*.safetensors"


@dataclass
class RetrofitConfig(Bounded, key="model.retrofit"):
    """What a model of transformers gets beside its own experts, and what of it is trained. All at its default: nothing
    is added, and all is trained.
    """

    upcycle: Whole = 0  # experts that each FFN of a dense model becomes first, two of them for a token; 0: none
    # steps in which such a model is trained as it is before anything is added, once for each seed: its experts are
    # copies, and of these a router learns nothing
    first_steps: Whole = 0
    zero: Whole = 0  # zero experts beside the family's own in every MoE layer
    copy: Whole = 0  # copy experts
    constant: Whole = 0  # constant experts
    scaled_copy: bool = False  # copies have a learnt factor
    gating_residual: bool = False  # from each router to the next
    init: Literal["silent", "warm", "zeda"] = "silent"  # how new experts begin
    share: Annotated[float, Range(0, 1)] = 0.25  # of the slots: what silent experts are calibrated to before step 1
    wake_steps: Whole = 0  # steps over which silent experts rise from none of the slots to their share
    recalibrate_every: Whole = 0  # steps between calibrations that hold this share while routers learn; 0: none
    # new: routers and new experts; experts: the family's too; lora: new, and adapters on what lies outside MoE blocks
    train: Literal["new", "experts", "all", "lora"] = "all"
    lora_rank: Count = 8  # of those adapters
    # or the divergence from the original model: KL(original || trained), and the reverse; validations then have the
    # former as val/divergence
    loss: Literal["cross_entropy", "forward_kl", "reverse_kl"] = "cross_entropy"
    # tokens of each sequence after which the divergence is learnt on the trained model's own continuation, sampled from
    # it at every step (arXiv 2306.13649); 0: on the text
    own_after: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recalibrate_every and self.init != "silent":
            raise ValueError(f"recalibrate_every={self.recalibrate_every} is of init=silent, not of init={self.init}")
        if self.own_after and self.loss == "cross_entropy":
            raise ValueError(f"own_after={self.own_after} learns from the original: set loss=forward_kl or reverse_kl")
        if self.first_steps and not self.upcycle:
            raise ValueError(f"first_steps={self.first_steps} trains what a dense model becomes: set upcycle above 0")

    @property
    def adds(self) -> bool:
        return bool(self.zero or self.copy or self.constant or self.gating_residual)

    @property
    def wakes(self) -> bool:
        """Whether there are silent experts that a run calibrates before its first step."""
        return bool(self.zero or self.copy or self.constant) and self.init == "silent"


def folder_of(path: str) -> Path:
    """The folder itself, that of a packaged model, or that of a hub id once it is downloaded. Raises UsageError where
    there is none.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if path in PACKAGED:
        return packaged(path)
    if folder.exists() or path.count("/") != 1:
        raise UsageError(
            f"model.path={path}: must be a folder with a config.json, or a hub id such as owner/name, or one of"
            f" {', '.join(PACKAGED)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", WEIGHTS]))
    except Exception as error:  # of the network, the hub or its client, which have no common one
        raise UsageError(f"model.path={path}: cannot be had from the hub: {str(error).splitlines()[0]}") from None


def architecture_of(path: str) -> dict[str, Any]:
    """What config.json says."""
    file = folder_of(path) / "config.json"
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is no readable JSON: {error}") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise UsageError(f"{file} names no model_type")
    return found


def weights_of(path: str) -> list[Path]:
    """The files that hold them, by name."""
    folder = folder_of(path)
    if not (files := sorted(folder.glob(WEIGHTS))):
        raise UsageError(f"model.path={path} holds no {WEIGHTS}")
    return files


def first(architecture: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these that it has."""
    return next((architecture[name] for name in names if isinstance(architecture.get(name), int)), None)
