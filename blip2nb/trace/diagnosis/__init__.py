"""From a stage that differs to the module that goes wrong and the likely causes, each tried where it can be."""
