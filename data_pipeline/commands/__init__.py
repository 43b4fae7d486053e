"""The `bst data …` commands. Each is a thin layer over a function of the package."""
