"""Other programs' adapter files, read and written."""
