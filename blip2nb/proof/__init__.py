"""A converted directory and a recording of LAVIS: weights, behaviour, and the verdict. Never starts LAVIS."""
