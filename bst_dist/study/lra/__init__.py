"""Long Range Arena (Tay et al. 2020, arXiv 2011.04006): its tasks, and classifiers with the layers of this project."""
