"""Which weights are adapted, and how."""
