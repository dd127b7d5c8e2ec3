"""The experiments behind the stored sweeps, one file each: what it is ABOUT, its points, and how one of them is run."""
