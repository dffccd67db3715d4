"""Recipes: one YAML file a published system, for ``cbm fit --config NAME``."""
