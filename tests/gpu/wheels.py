"""Download wheels for `bare.sh` (`make wheels-gpu`): packages that training, a corpus and the tests need.

torch and numpy are not included.

python tests/gpu/wheels.py FOLDER PYTHON...
"""

import sys
from pathlib import Path

from bst_dist.study.pack.wheels import gather

ALSO = ("webdataset", "rensa", "backports.zstd", "pytest", "pytest-xdist", "hypothesis")

if __name__ == "__main__":
    folder, *pythons = sys.argv[1:]
    names = gather(Path(folder), pythons, ALSO)
    print(f"{folder}: {len(names)} packages for Python {' and '.join(pythons)}")
