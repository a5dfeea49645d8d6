"""Programs on top of the package: the demo, tables of results, and experiments."""
