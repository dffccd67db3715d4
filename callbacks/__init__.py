"""Lightning callbacks over the packages of cbm_lightning."""
