"""Recording and comparing activations of any two torch modules. Knows nothing of BLIP-2."""
