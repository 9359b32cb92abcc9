"""Adapters that start from data: from gradients or from inputs of the weights."""
