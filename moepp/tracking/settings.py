"""Where runs can be looked at. Read without MLflow."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class TrackingConfig:
    """Where runs can be looked at. The run record is written whatever stands here."""

    backend: Literal["mlflow", "jsonl"] = "mlflow"  # jsonl: the run record alone
    uri: str = ""  # empty: MLFLOW_TRACKING_URI, else sqlite:///<runs>/mlflow.db
    experiment: str = "moepp"
