"""`adapt`, and the tracing that finds how a function uses its weights.

A function is traced to a jaxpr, and its equations are evaluated with every adapted weight
held as a factored value. One file of rules for each family of primitives says what an
equation does to such a value.
"""
