"""Which tokens of a row are trained on: the assistant's, and proof that they are.

spans.py     the characters of a rendered chat that the assistant writes; reading starts at `find_spans`
shapes.py    the same, found once for all chats of one shape
spelling.py  which tokens those characters are, for byte-level tokenizers
encoder.py   all of it for many rows at a time
"""
