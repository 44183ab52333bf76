"""Names and bytes: the mapping, the readers, the writer, the conversion. No model code."""
