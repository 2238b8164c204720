"""llama.cpp's own converter, for models without a layout of ours: its classes, its environment, and what it writes.

classes        which classes the pinned converter knows
environment    a Python environment of its own, with the converter and what that imports
convert        one run of it: a merged folder in, a 16- or 32-bit GGUF out
requantize     that GGUF into another with quantized tensors
reference      transformers in the same environment, for the gate
driver         what runs in that environment; it imports nothing of ours
"""
