"""The web page of `backprop ui`; nothing of it is imported before that command is called."""
