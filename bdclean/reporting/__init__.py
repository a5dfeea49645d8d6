"""Reads what runs recorded, and writes tables and pages of it."""
