"""The way to engines that train on 100B tokens and more (docs/pretrain.md): MoE++ inside their models, and checkpoints
there and back. Each engine's module needs its package.
"""
