"""The families of models that the kit knows, a package each: all that is particular to one."""
