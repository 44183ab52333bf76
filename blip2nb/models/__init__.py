"""BLIP-2 on both sides: LAVIS's, transformers', the table that pairs them, the twins, the inputs."""
