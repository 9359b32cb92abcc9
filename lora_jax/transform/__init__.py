"""`adapt`, and `find_uses`, which infers the roles of the axes of weights.

`adapt` traces a function to a jaxpr and evaluates its equations. Each adapted weight is a
factored value: the frozen weight and its low-rank terms. The files `_rules_*.py` have the
rules, one file for each family of primitives.
"""
