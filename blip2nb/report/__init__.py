"""What a verification, a conversion and a sweep leave on disk: the forms of it, and who writes and reads them."""
