"""Axolotl configurations to recipes: `importer` reads and writes, `keys` and `data` list what becomes of each key."""
