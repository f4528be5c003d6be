"""Evaluation: reading benchmark files, scoring by option likelihood, result files and the demo's picture sheet.

Nothing here knows the model: a caller hands in a function from a packed batch to log-probabilities.
"""
