"""The offline half of CARSO: train a classifier and its purifier, measure them, write a bundle.

    datasets | networks | attacks    tables: to add an entry, add one file
    recipe                           all numbers that decide a trained system
    fitting                          training
    export                           networks to a bundle's files, and back
    robustness                       measuring, and telling people
    run                              from a recipe to a bundle, resumed where it was left
    command                          carso-train

A module imports only from lines above its own. `errors`, `durable` and `registry` import nothing of ours.
"""
