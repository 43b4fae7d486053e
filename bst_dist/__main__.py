"""`python -m bst_dist`: the command `bst`, also when the project is on the path but not installed."""

import sys

from bst_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
