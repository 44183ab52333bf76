"""The environment in which LAVIS runs, whoever made it: finding it, handing it work, and models that are held live."""
