"""Few concepts a class: penalties that give exact zeros, exact sparse heads, and what their sparsity is."""

from cbm_lightning.sparsity.elastic_net_path import ElasticNetPath
from cbm_lightning.sparsity.nec import Sparsity, nec
from cbm_lightning.sparsity.penalties import ElasticNet, GroupElasticNet, Penalty
from cbm_lightning.sparsity.pruning import keep_largest, keep_top_k
from cbm_lightning.sparsity.solution import SparseSolution

__all__ = [
    "ElasticNetPath",
    "SparseSolution",
    "nec",
    "Sparsity",
    "keep_largest",
    "keep_top_k",
    "Penalty",
    "ElasticNet",
    "GroupElasticNet",
]
