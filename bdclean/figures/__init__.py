"""Pictures, drawn with matplotlib from tensors and numbers alone.

matplotlib and scikit-learn take a second to load, so every function loads what it needs.
"""
