"""Running things elsewhere: the LAVIS environment and its kernel."""
