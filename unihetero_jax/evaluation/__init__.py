"""Evaluation: reading benchmark files, scoring by option likelihood, result files, diagnostics, the demo's sheet.

Scoring does not know the model: a caller hands in a function from a packed batch to log-probabilities. Only
`diagnostics` builds one, to roll images out.
"""
