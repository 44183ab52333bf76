"""The catalogue of faults: the mistakes that ports are made of, planted on purpose, and whether they are found.

Nothing that converts or proves needs it.

    planting.py     a fault, where it fits, and planting it so that it can be removed
    anatomy.py      the parts of a model where faults can be put
    in_files.py     faults of files        in_code.py    faults of code
    any_model.py    the catalogue for any model, of these two

    right.py        a right captioner, and what it is called with
    in_settings.py  faults of its configuration          in_inputs.py  faults of its inputs
    captioners.py   the catalogue for a captioner, of all four

    cases.py        one fault or several at their places, planted in memory or in a copy
    arising.py      at which stages that arises
    marks.py        where it shows, and which answers are right
    answers.py      how an answer and a catalogue show themselves
    bench.py        a fault planted, measured, asked for, and marked
"""
