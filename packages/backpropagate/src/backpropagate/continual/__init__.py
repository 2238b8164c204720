"""Continual training: several datasets in sequence, merged with SLAO. Start with `multirun`; `stream` is its loop."""
