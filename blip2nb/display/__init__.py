"""What people look at: figures, reports, notebook reprs."""
