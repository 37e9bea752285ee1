"""The generated garment data set."""
