"""Which tokens of a row are trained on: the assistant's, and proof that they are. Reading starts at `encoder.Encoder`.

leaves.py    the texts of a chat, one leaf each, and the chat with placeholders for them
renderer.py  how a template renders a chat
spans.py     the characters that the assistant writes, and both proofs: the reference
shapes.py    the same, found once for all chats of one shape
rows.py      one row a question where a template drops earlier thoughts
control.py   turn tokens in the data itself
masks.py     which tokens those characters are: three strategies, the slowest the reference
encoder.py   all of it for many rows at a time
"""
