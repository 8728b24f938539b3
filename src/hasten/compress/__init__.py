"""Compression: statistics of each matrix's input, methods that choose numbers from them, recipes by hand."""
