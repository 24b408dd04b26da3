"""What a trained update is like: singular values, ranks, spectra."""
