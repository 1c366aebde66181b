"""Makes prompt files in the recipe's schema: from the hub (`hub.py`) or local files (`rows.py`), by `pipeline.py`."""
