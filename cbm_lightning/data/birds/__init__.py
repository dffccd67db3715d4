"""The machinery behind `cbm_lightning.data.rendered_birds.RenderedBirds`: attributes, label rules, scenes, drawing."""
