"""Messages to tokens and loss weights, and back.

::

    renderers.py      what a renderer is, and the table of them
    chat_template.py  the tokenizer's own chat template
    role_colon.py     "User: … Assistant: …", for base models
    comparisons.py    two answers and the question which is better
    pieces.py         train-on choices: which pieces of a rendering are learned
    encoding.py       text to token ids, piece by piece
    preview.py        a datum as coloured text
"""
