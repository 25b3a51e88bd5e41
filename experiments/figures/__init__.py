"""Figures of the documents, each drawn by a module that lies beside it."""
