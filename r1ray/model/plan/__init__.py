"""Planning before paying: what a model weighs, needs and costs, from its config.json alone.

Reading order: shape, catalog, hardware, training (with adapter and activations), serving.
"""
