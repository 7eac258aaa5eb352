"""The offline half of CARSO: train a classifier and its purifier, measure them, write a bundle."""
