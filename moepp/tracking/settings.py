"""Where runs can be looked at. Read without MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moepp import names, register


@dataclass
class TrackingConfig:
    """Where runs can be looked at. The run record is written whatever stands here."""

    backend: Literal["mlflow", "jsonl"] = "mlflow"  # jsonl: the run record alone
    uri: str = ""  # empty: MLFLOW_TRACKING_URI, else sqlite:///<runs>/mlflow.db
    experiment: str = "moepp"  # MLflow's experiment
    loggers: list[str] = field(default_factory=list)  # more places: csv, tensorboard, wandb, or registered ones
    logger_options: dict[str, Any] = field(default_factory=dict)  # of loggers, each below its name

    def __post_init__(self) -> None:
        names.check("tracking.experiment", [self.experiment])
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(f"tracking.loggers={self.loggers} must name each logger once")
        for name in dict.fromkeys([*self.loggers, *self.logger_options]):
            options = self.logger_options.get(name, {})
            if not isinstance(options, dict):
                raise ValueError(f"tracking.logger_options.{name}={options} must be a mapping of options")
            register.logger.check(name, options)


def mirror_config(values: Mapping[str, Any]) -> TrackingConfig:
    """What the mirror of a run needs of its config's `tracking`: nothing of loggers, which the trainer calls and which
    may be a plugin's that this process never imports.
    """
    of_trainer = ("loggers", "logger_options")
    return TrackingConfig(**{key: value for key, value in values.items() if key not in of_trainer})
