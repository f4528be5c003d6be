"""Recipes of data mixtures: named sources with counts, licences and the commands that bring them."""
