"""What the paper adds to a sweep (its numbers, its claims), and studies that are no sweep, one file each.

The file's name is the experiment's, and it declares `EXPERIMENT`. Files import each other relatively: they are modules
of `moepp.experiments`, wherever they lie.
"""
