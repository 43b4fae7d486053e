"""The `bst data …` commands: thin, each over a function of the package."""
