"""What scripts/gpu_window.py is made of.

`node`, `stages`, `parcel` and `summary` need the standard library alone: on the GPU's machine they begin before
anything is installed.
"""
