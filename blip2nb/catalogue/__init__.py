"""The catalogue of faults: the mistakes that ports are made of, planted on purpose, and whether they are found."""
