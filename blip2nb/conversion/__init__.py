"""From files to a directory that transformers loads: recognise, assemble, preview, write, check, revert, push."""
