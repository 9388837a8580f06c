"""MoE++ (arXiv 2410.07348): zero-computation experts, gating residuals, and the experiments that test them."""

__version__ = "0.1.0"
