"""What a sweep found over all its runs: index.html and, of the same content, index.json, summary.md and junit.xml.

`entry` is about one run, `index` puts the runs together, `page`, `markdown` and `junit` are texts of the index alone,
and `files` writes them.
"""
