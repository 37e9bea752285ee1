"""A trained network used: embeddings, files of them, exported networks."""
