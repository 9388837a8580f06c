"""What Lightning's own strategies need to go on from any strategy's checkpoints."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from moepp.models import checkpoint_parts as parts


class CheckpointsOfAnyForm(TorchCheckpointIO):
    """Reads a folder of parts as the file that one device would have written."""

    def load_checkpoint(self, path: str | Path, *options: Any, **named: Any) -> dict[str, Any]:
        return parts.read_whole(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *options, **named)
