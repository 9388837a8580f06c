"""Other people's MoE models turned into MoE++ models, observed, upcycled and exported. Needs the extra `hf`."""

from moepp.retrofit.calibration import calibrate, wake
from moepp.retrofit.folders import export, load
from moepp.retrofit.observe import observe
from moepp.retrofit.surgery import retrofit, strip
from moepp.retrofit.upcycle import upcycle

__all__ = ["calibrate", "export", "load", "observe", "retrofit", "strip", "upcycle", "wake"]
