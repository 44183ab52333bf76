"""BLIP-2 captioners on OPT and T5: their rules, stages, inputs, configuration, and how each library runs them."""
