"""Contextual decomposition: any activation as relevant + irrelevant, from tokens, heads and MLPs to anything behind them."""

from mechinterp.decomposition.propagate import TARGETS, both_parts, propagate
from mechinterp.decomposition.rule_sets import RULE_SETS, Rules, rules_name, rules_named
from mechinterp.decomposition.sources import Source, mean_reference, parse_sources
from mechinterp.decomposition.split import Split
from mechinterp.decomposition.totals import Totals

__all__ = [
    "RULE_SETS",
    "TARGETS",
    "Rules",
    "Source",
    "Split",
    "Totals",
    "both_parts",
    "mean_reference",
    "parse_sources",
    "propagate",
    "rules_name",
    "rules_named",
]
