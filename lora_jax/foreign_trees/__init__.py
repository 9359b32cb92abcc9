"""Adapters that lie in the params of other libraries."""
